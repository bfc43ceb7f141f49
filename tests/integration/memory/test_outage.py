"""The database dies under a running store, and comes back."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import probes
from launcher.embedded.postgres import Postgres
from meshkit.errors import UnavailableError
from meshkit.ids import uuid7
from meshkit.migrate import migrate
from meshkit.postgres import open_pool
from services.memory.store.postgres import MIGRATIONS, SCHEMA, PostgresStore
from tests.conftest import wait_for
from tests.integration.memory.test_store import ANN, new, query

DEADLINE = 30.0


class Server:
    """A PostgreSQL of one's own, to kill."""

    def __init__(self, folder: Path) -> None:
        self._server = Postgres(folder / "data", folder, "test-password")
        self._log = folder / "log"
        self._server.initialize()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self._server.url()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._server.command(), stdout=log, stderr=log, cwd="/")
        wait_for(lambda: asyncio.run(probes.postgres(self.url)), self.process)

    def stop(self) -> None:
        """At once, without a checkpoint, as a crash would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(timeout=DEADLINE)
            self.process = None


@pytest.fixture
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="hm-pg-"))
    server = Server(folder)
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


async def test_the_store_fails_typed_and_goes_on_by_itself(server: Server) -> None:
    tenant = uuid7()
    await asyncio.to_thread(server.start)
    await migrate(server.url, MIGRATIONS, schema=SCHEMA)
    async with await open_pool(server.url, min_size=2, max_size=4) as pool:
        store = PostgresStore(pool, max_per_scope=10)
        kept = await store.remember(tenant, new(request_id="r"))
        server.stop()
        for _ in range(3):
            with pytest.raises(UnavailableError) as caught:
                await store.recall(tenant, ANN, query())
            assert caught.value.reason == "DATABASE_UNAVAILABLE"
            assert caught.value.retry_after_ms
        await asyncio.to_thread(server.start)
        assert await store.remember(tenant, new(request_id="r")) == kept
        assert [found.memory for found in await store.recall(tenant, ANN, query())] == [kept]
