"""PostgreSQL's disk is full: writes are refused in the open, nothing accepted is lost, and all goes on."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import grpc
import grpc.aio
import pytest

from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_service_pb2 as public
from launcher import probes
from launcher.embedded.postgres import Postgres
from meshkit.errors import HermeshError, from_rpc_error
from meshkit.migrate import migrate
from tests.conftest import MIGRATIONS, wait_for
from tests.integration.session.conftest import bootstrap
from tests.integration.session.process import Client, SessionProcess, connect, environment, metric
from tests.integration.session.test_faults import readiness
from tests.unit.session.calls import (
    Stream,
    Writer,
    append_stream,
    events_of,
    events_until,
    new_writer,
    submit,
    watch,
)

COMMITTED = internal.APPEND_OUTCOME_COMMITTED
RETRY = internal.APPEND_OUTCOME_RETRY
# A database with its first write-ahead log, and some room to fill.
DISK_BYTES = 160 * 1024 * 1024
# Text that does not compress, so that a few appends need new pages.
DATA = json.dumps({"text": secrets.token_hex(10_000)})


class Disk:
    """A small file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode != 0:
            pytest.skip(f"this needs the right to mount a file system: {mounted.stderr.strip()}")

    def fill(self) -> None:
        """Takes all that is left."""
        with self._ballast.open("wb") as file:
            size = 0
            while left := self._free():
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), size, left)
                size += left

    def _free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def make_room(self) -> None:
        self._ballast.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk() -> Iterator[Disk]:
    folder = Path(tempfile.mkdtemp(prefix="hm-disk-"))
    try:
        made = Disk(folder)
        yield made
        made.unmount()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Database:
    """A PostgreSQL on that disk, which is started again whenever it ends."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self.server = Postgres(disk.folder / "data", folder, "test-password")
        self.url = self.server.url()
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._log = folder / "log"

    def start(self) -> None:
        self.starts += 1
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self.server.command(), stdout=log, stderr=log, cwd="/")

    async def keep(self) -> None:
        """Starts it again and again, as a supervisor does, until cancelled."""
        while True:
            assert self.process is not None
            if self.process.poll() is not None:
                self.start()
            await asyncio.sleep(0.1)

    def wait(self) -> None:
        assert self.process is not None
        wait_for(lambda: asyncio.run(probes.postgres(self.url)), self.process)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(timeout=30)

    def said(self, words: str) -> bool:
        return words in self._log.read_text(errors="replace")

    async def next_segment(self) -> None:
        """Goes on in a new file of the write-ahead log."""
        connection = await asyncpg.connect(self.url, timeout=5)
        try:
            await connection.fetchval("SELECT pg_switch_wal()")
            await connection.execute("SELECT pg_logical_emit_message(false, 'test', 'x', true)")
        finally:
            connection.terminate()


@asynccontextmanager
async def database_on(disk: Disk) -> AsyncIterator[Database]:
    folder = Path(tempfile.mkdtemp(prefix="hm-pg-"))
    database = Database(disk, folder)
    try:
        await asyncio.to_thread(database.server.initialize)
        database.start()
        await asyncio.to_thread(database.wait)
        await migrate(database.url, MIGRATIONS["session"], schema="session")
        await asyncio.to_thread(bootstrap, database.url)
        yield database
    finally:
        database.kill()
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def replica_on(database: Database) -> AsyncIterator[tuple[SessionProcess, Client]]:
    replica = SessionProcess("session-1", environment(database.url))
    try:
        await asyncio.to_thread(replica.wait_ready)
        async with connect(replica) as client:
            yield replica, client
            lines = replica.log.read_text().splitlines()
            # asyncpg adds a stack to its own warning that PostgreSQL is gone.
            assert [line for line in lines if "Traceback" in line and '"level":"warning"' not in line] == []
    finally:
        replica.kill()
        shutil.rmtree(replica.folder, ignore_errors=True)


async def write_until_refused(stream: Stream, writer: Writer) -> internal.RunAppend:
    """Appends until the disk has no room; returns the append that was not taken."""
    async with asyncio.timeout(30):
        while True:
            append = writer.append("text.delta", data=DATA)
            [result] = await stream.write(append)
            if result.outcome != COMMITTED:
                assert result.outcome == RETRY
                return append


async def write_until_taken(stream: Stream, append: internal.RunAppend) -> None:
    """Sends the same bytes again, as an agent does, until they are stored."""
    async with asyncio.timeout(60):
        while True:
            [result] = await stream.write(append)
            if result.outcome == COMMITTED:
                return
            await asyncio.sleep(0.05)


async def refused(client: Client, session_id: str) -> HermeshError:
    """The error that new input gets."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await submit(client, session_id, text=DATA)
    error = from_rpc_error(raised.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    assert error.retry_after_ms
    return error


async def check_whole(client: Client, writer: Writer) -> None:
    """The run ends well, and its log is all that was acknowledged, in order, once."""
    async with asyncio.timeout(30):
        async with append_stream(client) as stream:
            await write_until_taken(stream, writer.append("run.completed", status=4))
        async with watch(client, writer.run_id) as watched:
            events = await events_of(watched)
    assert [event.seq for event in events] == list(range(1, writer.next_seq))
    assert {event.data for event in events if event.type == "text.delta"} == {DATA}


async def test_a_full_disk_refuses_what_is_new_and_keeps_what_was_accepted(disk: Disk) -> None:
    async with database_on(disk) as database, replica_on(database) as (replica, client):
        writer, other = await new_writer(client), await new_writer(client)
        # Of the log there is enough: what lacks is room for new pages.
        await database.next_segment()
        async with append_stream(client) as stream:
            assert (await stream.write(writer.append("text.delta", data=DATA)))[0].outcome == COMMITTED
            disk.fill()
            append = await write_until_refused(stream, writer)
            assert "its disk is full" in (await refused(client, other.session_id)).message
            # What is stored can be read all the while.
            request = public.GetRunRequest(run_id=writer.run_id)
            found = await client.public.GetRun(request, metadata=client.metadata)
            assert found.run.run_id == writer.run_id
            async with watch(client, writer.run_id) as watched:
                async with asyncio.timeout(10):
                    assert (await events_until(watched, 2))[0].seq == 1
            status, checks = await asyncio.to_thread(readiness, replica)
            assert status == 200
            assert checks["postgresql"]["reason"] == "PostgreSQL refuses work: its disk is full"
            assert metric(replica, 'hermesh_dependency_up{dependency="postgresql"}') == 0
            assert metric(replica, 'hermesh_session_database_refusals_total{sqlstate="53100"}') > 0
            disk.make_room()
            await write_until_taken(stream, append)
        assert (await submit(client, other.session_id)).run.ordinal == 2
        await check_whole(client, writer)
        assert database.starts == 1


async def test_a_disk_too_full_for_the_log_stops_postgresql_and_all_goes_on_when_there_is_room(
    disk: Disk,
) -> None:
    async with database_on(disk) as database, replica_on(database) as (replica, client):
        writer, other = await new_writer(client), await new_writer(client)
        keeping = asyncio.create_task(database.keep())
        try:
            async with append_stream(client) as stream:
                assert (await stream.write(writer.append("text.delta", data=DATA)))[0].outcome == COMMITTED
                disk.fill()
                async with asyncio.timeout(30):
                    while not database.said("No space left on device"):
                        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                            await database.next_segment()
                append = await write_until_refused(stream, writer)
                await refused(client, other.session_id)
                status, checks = await asyncio.to_thread(readiness, replica)
                assert (status, checks["postgresql"]["ok"]) == (200, False)
                disk.make_room()
                await write_until_taken(stream, append)
            assert (await submit(client, other.session_id)).run.ordinal == 2
            await check_whole(client, writer)
            assert database.said("PANIC")
        finally:
            keeping.cancel()
