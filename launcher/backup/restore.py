"""Putting a backup into a mesh that has nothing yet. What is there already is never overwritten."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import ObjectStore

from launcher import probes
from launcher.backup.archive import SCHEMAS, Archive, Manifest, Ref
from launcher.backup.programs import load
from launcher.backup.take import Say, in_parallel
from launcher.embedded.postgres import Postgres
from launcher.errors import LaunchError
from launcher.settings import CHECKOUT
from meshkit.objects import CALL_SECONDS, FAILURES, explain, open_store
from services.tool.results import RESULTS, object_path

_COPIES = 4
_PAGE = 1000
_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
_REDIS_KEYS = "hermesh:*"

_THERE = "SELECT nspname FROM pg_namespace WHERE nspname = ANY($1::text[])"
_VECTOR = "CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public"
_COUNT = "SELECT count(*) FROM {schema}.{table}"


async def check_new(manifest: Manifest, root: Path) -> None:
    """Raises LaunchError when the backup is of a later version than this one."""
    for schema in SCHEMAS:
        known = {file.name for file in (CHECKOUT / f"services/{schema}/store/migrations").glob("*.sql")}
        if later := sorted(set(manifest.migrations.get(schema, ())) - known):
            raise LaunchError(
                f"the backup in {root} is of version {manifest.hermesh} and has migration {later[0]}, which "
                "this version does not know; restore it with a newer one"
            )


async def restore(
    archive: Archive, manifest: Manifest, database: Postgres | str, object_url: str, redis_url: str, say: Say
) -> None:
    """Puts a backup into stores that are empty.

    Args:
        archive: The backup.
        manifest: What is in it.
        database: The embedded PostgreSQL, which does not run, or the URL of another one.
        object_url: The object store.
        redis_url: A Redis of one's own; empty for the embedded one, which keeps nothing.
        say: Told of each step.

    Raises:
        LaunchError: Something is there already, or it failed; the database then has nothing of it.
    """
    await check_new(manifest, archive.root)
    say("looking whether anything is there")
    if redis_url:
        await check_redis(redis_url)
    store = open_store(object_url)
    listed = {object_path(ref.tenant_id, ref.session_id, ref.ref) for ref in archive.listed()}
    await check_objects(store, object_url, listed)
    if isinstance(database, Postgres):
        check_folder(database)
    else:
        await _check_database(database)
    say("copying large results")
    await _copy_all(archive, manifest, store, object_url)
    say("loading the database")
    if isinstance(database, str):
        await _load(archive, manifest, database)
        return
    try:
        async with _serving(database):
            await _load(archive, manifest, database.url())
    except BaseException:
        # It was not there before, so nothing of anybody's is lost, and the next try finds it empty.
        shutil.rmtree(database.data, ignore_errors=True)
        raise


def check_folder(database: Postgres) -> None:
    """Raises LaunchError when there is a database."""
    if database.data.exists() and any(database.data.iterdir()):
        raise LaunchError(
            f"there is a database in {database.data}; nothing is overwritten: set HERMESH_DATA_DIR to a new "
            "folder, or move that one away"
        )


async def _check_database(url: str) -> None:
    connection = await _connect(url)
    try:
        found = [row["nspname"] for row in await connection.fetch(_THERE, list(SCHEMAS))]
    finally:
        connection.terminate()
    if found:
        raise LaunchError(
            f"the database has the schema {' and '.join(sorted(found))} already; nothing is overwritten: "
            "name an empty one in HERMESH_DATABASE_URL"
        )


async def check_objects(store: ObjectStore, url: str, ours: set[str]) -> None:
    """Raises LaunchError when a store has results that are not `ours`.

    What an earlier try of the same restore left is no obstacle: it is the same bytes.
    """
    try:
        async for page in obstore.list(store, f"{RESULTS}/", chunk_size=_PAGE):
            for found in page:
                path = found["path"]
                if path.count("/") > 1 and path not in ours:
                    raise LaunchError(
                        f"the object store has results of another mesh, such as {path}; nothing is mixed: "
                        "name another bucket or prefix in HERMESH_OBJECT_STORE_URL"
                    )
    except FAILURES as error:
        raise LaunchError(explain(error, url)) from error


async def check_redis(url: str) -> None:
    """Raises LaunchError when a Redis is not empty.

    It may know later fences and events than the backup, and would be believed.
    """
    import redis.asyncio
    from redis.exceptions import RedisError

    client = redis.asyncio.Redis.from_url(url, socket_timeout=_CONNECT_SECONDS)
    try:
        async for _ in client.scan_iter(match=_REDIS_KEYS, count=_PAGE):
            raise LaunchError(
                "Redis still has what another mesh, or this one, wrote there; it holds nothing that lasts: "
                "empty it (FLUSHDB), or name another one in HERMESH_REDIS_URL"
            )
    except (RedisError, OSError) as error:
        raise LaunchError(f"Redis cannot be asked whether it is empty ({type(error).__name__})") from error
    finally:
        await client.aclose()


async def _copy_all(archive: Archive, manifest: Manifest, store: ObjectStore, url: str) -> None:
    refs = archive.listed()
    missing = set(manifest.missing)

    async def work(refs: Iterator[Ref]) -> None:
        for ref in refs:
            path = object_path(ref.tenant_id, ref.session_id, ref.ref)
            if path not in missing:
                await put(store, url, path, await asyncio.to_thread(whole, archive.objects / path, ref))

    await in_parallel([work(refs) for _ in range(_COPIES)])


def whole(path: Path, ref: Ref) -> bytes:
    """The bytes of a result in a backup. Raises LaunchError when they are not what they were."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LaunchError(f"the backup is not whole: {path} cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise LaunchError(f"the backup is damaged: {path} is not what it was")
    return data


async def put(store: ObjectStore, url: str, path: str, data: bytes) -> None:
    """Stores an object that is not there, or is the same. Raises LaunchError."""
    try:
        async with asyncio.timeout(3 * CALL_SECONDS):
            try:
                await obstore.put_async(store, path, data, mode="create")
            except AlreadyExistsError as error:
                # An earlier try's, or our own: the client sends a write again whose answer was lost.
                if bytes(await (await obstore.get_async(store, path)).bytes_async()) != data:
                    raise LaunchError(
                        f"the object store has another {path}; nothing is overwritten"
                    ) from error
    except FAILURES as error:
        raise LaunchError(f"a large result cannot be written: {explain(error, url)}") from error


async def _load(archive: Archive, manifest: Manifest, url: str) -> None:
    connection = await _connect(url)
    try:
        await connection.execute(_VECTOR)
        await load(url, _number(connection), archive.dump)
        for name, rows in manifest.rows.items():
            schema, table = name.split(".")
            found = await connection.fetchval(_COUNT.format(schema=schema, table=table))
            if found != rows:
                raise LaunchError(f"the restored {name} has {found} rows, the backup {rows}: do not use it")
    except asyncpg.PostgresError as error:
        raise LaunchError(f"the database cannot be restored: {' '.join(str(error).split())}") from error
    finally:
        connection.terminate()


def _number(connection: asyncpg.Connection[asyncpg.Record]) -> int:
    server = connection.get_server_version()
    return int(server.major) * 10_000 + int(server.minor)


async def _connect(url: str) -> asyncpg.Connection[asyncpg.Record]:
    try:
        return await asyncpg.connect(url, timeout=_CONNECT_SECONDS)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
        raise LaunchError(
            f"PostgreSQL cannot be reached ({type(error).__name__}); check HERMESH_DATABASE_URL"
        ) from error


@asynccontextmanager
async def _serving(database: Postgres, *options: str) -> AsyncIterator[None]:
    """Has the embedded server run for the time of the block, with nobody else on it."""
    database.prepare()
    log = database.sockets / "restore.log"
    process = start([*database.command(), *options], log)
    try:
        end = time.monotonic() + _START_SECONDS
        while not await probes.postgres(database.url()):
            if process.poll() is not None or time.monotonic() > end:
                said = log.read_text(errors="replace")
                why = " ".join(said.split())[-300:]
                raise LaunchError(database.explain(said) or f"PostgreSQL did not start: {why}")
            await asyncio.sleep(0.05)
        yield
    finally:
        await asyncio.to_thread(stop, process)
        log.unlink(missing_ok=True)


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a server whose output goes into a file."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends it, and returns when it has."""
    # Fast: open connections are ended, and everything is written down.
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=_STOP_SECONDS)
