"""Making what one cell's database and object store have of a tenant the same as another's.

Both sides are compared by digests that PostgreSQL computes, a session at a time, and only what differs is
copied. So copying may be done again at any time, goes on where it was broken off, and is its own proof.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import IO, Any, TypeAlias
from uuid import UUID

import asyncpg
import obstore
from obstore.store import ObjectStore

from launcher.backup.archive import Ref
from launcher.backup.take import in_parallel, read_object
from launcher.cells.table import Cell
from launcher.errors import LaunchError
from meshkit.objects import CALL_SECONDS, FAILURES, NOT_FOUND, explain, open_store
from meshkit.postgres import load_sql
from services.tool.results import RESULTS, object_path

SQL = load_sql("launcher.cells", "move.sql")
Say = Callable[[str], None]
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_SESSIONS = 200
_MEMORY = 32 * 1024 * 1024
_COPIES = 4
_CONNECT_SECONDS = 10.0
# A batch of sessions may be large.
_STATEMENT_SECONDS = 300.0
# Sessions' own tables, parents first; and those that belong to the tenant alone.
_OF_SESSIONS = ("session", "lease", "run", "message", "tool_call", "event")
_OF_TENANT = {"api_key": "session", "idempotency": "session", "item": "memory", "preference": "memory"}
# Rows are compared as text: both servers have to write it alike.
_ALIKE = {
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "application_name": "hermesh-move",
    "statement_timeout": "0",
}


class Held(IntEnum):
    """Why a tenant may not be changed in a cell."""

    LEAVING = 1
    ARRIVING = 2
    MOVED = 3


@dataclass(frozen=True, slots=True)
class Side:
    """A cell's stores, open."""

    cell: Cell
    database: Connection
    objects: ObjectStore | None
    objects_url: str


@asynccontextmanager
async def opened(cell: Cell) -> AsyncIterator[Side]:
    """Opens a cell's stores for the time of the block.

    Raises:
        LaunchError: Nobody says where they are, or they cannot be reached.
    """
    url = cell.secret("DATABASE_URL")
    if not url:
        name = cell.variable("DATABASE_URL")
        raise LaunchError(f"set {name} or {name}_FILE: how cell {cell.name}'s database is reached")
    try:
        database: Connection = await asyncpg.connect(
            url,
            timeout=_CONNECT_SECONDS,
            command_timeout=_STATEMENT_SECONDS,
            statement_cache_size=0,
            server_settings=_ALIKE,
        )
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
        raise LaunchError(
            f"cell {cell.name}'s PostgreSQL cannot be reached ({type(error).__name__})"
        ) from error
    try:
        objects_url = cell.secret("OBJECT_STORE_URL")
        yield Side(cell, database, open_store(objects_url) if objects_url else None, objects_url)
    finally:
        database.terminate()


@asynccontextmanager
async def changing(side: Side, tenant_id: UUID, held: Held) -> AsyncIterator[Connection]:
    """A transaction that may change a tenant which nobody else may.

    Raises:
        LaunchError: It is not held so any more: another command has gone on with it.
    """
    async with side.database.transaction():
        state = await side.database.fetchval(SQL["lock_state"], tenant_id)
        if state != held:
            raise LaunchError(
                f"another command has gone on with this move: cell {side.cell.name} does not hold the tenant "
                "as it did; look with: hermesh cells list"
            )
        await side.database.fetchval(SQL["set_moving"], str(tenant_id))
        yield side.database


class Copier:
    """Copies one tenant from one cell to another."""

    def __init__(self, source: Side, target: Side, tenant_id: UUID) -> None:
        """Copies nothing yet."""
        self._source = source
        self._target = target
        self._tenant_id = tenant_id
        self._columns: dict[str, list[str]] = {}

    async def rows(self, *, thoroughly: bool) -> int:
        """Makes the target's rows those of the source; returns how many sessions were copied.

        Args:
            thoroughly: Whether to compare the text of all events; without, of those that are copied only.

        Raises:
            LaunchError: What was just copied is not what it was copied from.
        """
        source, target = self._source.database, self._target.database
        row = await source.fetchrow(SQL["get_tenant"], self._tenant_id)
        if row is None:
            raise LaunchError(f"cell {self._source.cell.name} has the tenant no more")
        async with self.change() as connection:
            await connection.execute(
                SQL["put_tenant"],
                *(row[name] for name in ("tenant_id", "name", "created_at", "concurrency", "approval_tools")),
                row["run_timeout_ms"],
            )
        for table, schema in _OF_TENANT.items():
            await self._buckets(schema, table)
        here = [row["session_id"] for row in await source.fetch(SQL["session_ids"], self._tenant_id)]
        there = {row["session_id"] for row in await target.fetch(SQL["session_ids"], self._tenant_id)}
        gone = sorted(there.difference(here))
        for batch in _batches(gone):
            async with self.change() as connection:
                await connection.execute(SQL["drop_events"], batch)
                await connection.execute(SQL["drop_sessions"], batch)
        copied = 0
        for batch in _batches(here):
            copied += await self._sessions(batch, thoroughly=thoroughly)
        return copied

    @asynccontextmanager
    async def change(self) -> AsyncIterator[Connection]:
        """A transaction of the target that may change the tenant, as long as it has not arrived there."""
        async with changing(self._target, self._tenant_id, Held.ARRIVING) as connection:
            yield connection

    async def _sessions(self, batch: Sequence[UUID], *, thoroughly: bool) -> int:
        source, target = self._source.database, self._target.database
        async with source.transaction(isolation="repeatable_read", readonly=True):
            wanted = await _digests(source, batch, thoroughly=thoroughly)
            found = await _digests(target, batch, thoroughly=thoroughly)
            differ = [session_id for session_id in wanted if found.get(session_id) != wanted[session_id]]
            if not differ:
                return 0
            async with self.change() as connection:
                await connection.execute(SQL["drop_events"], differ)
                await connection.execute(SQL["drop_sessions"], differ)
                await connection.execute(SQL["keep_results"], differ)
                for table in _OF_SESSIONS:
                    await self._copy("session", table, SQL[f"copy_{table}"], differ)
                if await _digests(source, differ, thoroughly=True) != await _digests(
                    connection, differ, thoroughly=True
                ):
                    raise LaunchError(
                        f"what was copied of {len(differ)} sessions is not what {self._source.cell.name} "
                        "has; nothing was switched. Is PostgreSQL of one version in both cells?"
                    )
        return len(differ)

    async def _buckets(self, schema: str, table: str) -> None:
        source, target = self._source.database, self._target.database
        async with source.transaction(isolation="repeatable_read", readonly=True):
            statement = SQL[f"digests_{table}"]
            wanted = {row["bucket"]: row["digest"] for row in await source.fetch(statement, self._tenant_id)}
            found = {row["bucket"]: row["digest"] for row in await target.fetch(statement, self._tenant_id)}
            differ = sorted(
                bucket for bucket in wanted.keys() | found.keys() if wanted.get(bucket) != found.get(bucket)
            )
            if not differ:
                return
            async with self.change() as connection:
                await connection.execute(SQL[f"drop_{table}"], self._tenant_id, differ)
                await self._copy(schema, table, SQL[f"copy_{table}"], self._tenant_id, differ)
                found = {
                    row["bucket"]: row["digest"] for row in await connection.fetch(statement, self._tenant_id)
                }
                if found != wanted:
                    raise LaunchError(f"what was copied of {schema}.{table} is not what it was copied from")

    async def _copy(self, schema: str, table: str, statement: str, *args: Any) -> None:
        """Copies rows, by way of memory, or of a file where they are many."""
        source, target = self._source.database, self._target.database
        name = f"{schema}.{table}"
        if name not in self._columns:
            self._columns[name] = [row["name"] for row in await source.fetch(SQL["columns"], name)]
        with tempfile.SpooledTemporaryFile(max_size=_MEMORY) as held:
            await source.copy_from_query(statement, *args, output=_taker(held), format="binary")
            held.seek(0)
            await target.copy_to_table(
                table,
                schema_name=schema,
                columns=self._columns[name],
                source=_pieces(held),
                format="binary",
            )

    async def results(self, say: Say) -> int:
        """Copies the large results that the target does not have; returns how many."""
        rows = await self._source.database.fetch(SQL["results"], self._tenant_id)
        refs = iter([Ref(self._tenant_id, row["session_id"], row["content_ref"]) for row in rows])
        if not rows:
            return 0
        source, target = self._source, self._target
        if source.objects is None or target.objects is None:
            side = source if source.objects is None else target
            name = side.cell.variable("OBJECT_STORE_URL")
            raise LaunchError(f"the tenant has large results: set {name} or {name}_FILE")
        copied = 0
        from_store, to_store = source.objects, target.objects

        async def work(refs: Iterator[Ref]) -> None:
            nonlocal copied
            for ref in refs:
                path = object_path(ref.tenant_id, ref.session_id, ref.ref)
                if await has(to_store, target.objects_url, path):
                    continue
                data = await read_object(from_store, source.objects_url, ref)
                if data is None:
                    say(f"missing in cell {source.cell.name}'s object store, or damaged there: {path}")
                    continue
                await put(to_store, target.objects_url, path, data)
                copied += 1

        await in_parallel([work(refs) for _ in range(_COPIES)])
        return copied


async def _digests(
    connection: Connection, session_ids: Sequence[UUID], *, thoroughly: bool
) -> dict[UUID, str]:
    rows = await connection.fetch(SQL["session_digests"], session_ids, thoroughly)
    return {row["session_id"]: row["digest"] for row in rows}


def _batches(ids: Sequence[UUID]) -> Iterator[Sequence[UUID]]:
    for start in range(0, len(ids), _SESSIONS):
        yield ids[start : start + _SESSIONS]


def _taker(held: IO[bytes]) -> Callable[[bytes], Any]:
    async def take(data: bytes) -> None:
        held.write(data)

    return take


async def _pieces(held: IO[bytes]) -> AsyncIterator[bytes]:
    while piece := held.read(256 * 1024):
        yield piece


async def has(store: ObjectStore, url: str, path: str) -> bool:
    """Whether an object store has an object."""
    try:
        async with asyncio.timeout(CALL_SECONDS):
            await obstore.head_async(store, path)
    except FAILURES as error:
        if isinstance(error, NOT_FOUND):
            return False
        raise LaunchError(f"a large result cannot be looked up: {explain(error, url)}") from error
    return True


async def put(store: ObjectStore, url: str, path: str, data: bytes) -> None:
    """Writes an object."""
    try:
        async with asyncio.timeout(CALL_SECONDS):
            await obstore.put_async(store, path, data)
    except FAILURES as error:
        raise LaunchError(f"a large result cannot be written: {explain(error, url)}") from error


async def same_objects(one: Side, other: Side) -> bool:
    """Whether two cells keep their results in one place, whatever it is called."""
    if one.objects is None or other.objects is None:
        return False
    if one.objects_url == other.objects_url:
        return True
    path = f"{RESULTS}/probe-{os.urandom(8).hex()}"
    await put(one.objects, one.objects_url, path, b"probe")
    try:
        return await has(other.objects, other.objects_url, path)
    finally:
        await obstore.delete_async(one.objects, path)


async def purge(side: Side, tenant_id: UUID, held: Held, *, keep_results: bool) -> int:
    """Deletes all that a cell has of a tenant that it holds, and what held it; returns how many sessions.

    The tool service removes the results of sessions that are gone, unless they are another cell's, too.
    """
    ids = [row["session_id"] for row in await side.database.fetch(SQL["session_ids"], tenant_id)]
    for batch in _batches(ids):
        async with changing(side, tenant_id, held) as connection:
            await connection.execute(SQL["drop_events"], batch)
            await connection.execute(SQL["drop_sessions"], batch)
            if keep_results:
                await connection.execute(SQL["keep_results"], batch)
    async with changing(side, tenant_id, held) as connection:
        for table in _OF_TENANT:
            found = [row["bucket"] for row in await connection.fetch(SQL[f"digests_{table}"], tenant_id)]
            await connection.execute(SQL[f"drop_{table}"], tenant_id, found)
        await connection.execute(SQL["drop_tenant"], tenant_id)
        await connection.execute(SQL["free"], tenant_id)
    return len(ids)
