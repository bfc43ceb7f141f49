"""A PostgreSQL and its synchronous standby, real ones, that can be frozen, lost and promoted."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg

from launcher.embedded.postgres import BIN, as_ordinary_user
from meshkit.migrate import migrate
from tests.chaos.faults.stores import PASSWORD, Store, own_postgres
from tests.conftest import MIGRATIONS

SECONDS = 30.0


def processes(store: Store) -> list[int]:
    """The pids of a server and all that it started."""
    assert store.process is not None
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [store.process.pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def send(store: Store, number: signal.Signals) -> None:
    """Signals a server and all that it started."""
    for pid in processes(store):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


@dataclass
class Replicated:
    """A primary whose commits wait for its standby."""

    primary: Store
    standby: Store

    @property
    def url(self) -> str:
        """Where the primary is."""
        return self.primary.url

    @property
    def both(self) -> str:
        """Where both are, in an order that does not change: whichever is the primary."""
        folders = sorted(quote(str(store.socket.parent), safe="") for store in (self.primary, self.standby))
        return f"postgresql://postgres:{PASSWORD}@/postgres?host={','.join(folders)}&port=5432"

    async def ask(self, statement: str, *, of: Store | None = None) -> Any:
        """One value, from the primary if not said otherwise."""
        connection = await asyncpg.connect((of or self.primary).url, timeout=SECONDS)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    async def until(self, statement: str, value: Any, *, of: Store | None = None) -> None:
        """Asks until this is the answer: a server tells nobody that its settings have changed."""
        async with asyncio.timeout(SECONDS):
            while await self.ask(statement, of=of) != value:  # noqa: ASYNC110 - see above
                await asyncio.sleep(0.02)

    def freeze(self) -> None:
        """The standby does nothing any more."""
        send(self.standby, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        send(self.standby, signal.SIGCONT)

    async def lose_primary(self) -> None:
        """Kills every process of the primary."""
        send(self.primary, signal.SIGKILL)
        await self.primary.stop(signal.SIGKILL)

    async def promote(self) -> None:
        """Makes the standby the primary; it has none of its own until `rebuild`."""
        await self.ask("SELECT pg_promote(true, 30)", of=self.standby)
        self.primary, self.standby = self.standby, self.primary

    async def rebuild(self) -> None:
        """Makes a new standby where the lost primary was; commits wait for it from here on."""
        shutil.rmtree(self.standby.socket.parent / "data")
        await base_backup(self.primary.socket.parent, self.standby.socket.parent)
        await self.standby.start()
        await self.wait_for_standby()

    async def wait_for_standby(self) -> None:
        """Has commits wait for the standby from here on."""
        await self.ask("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await self.ask("SELECT pg_reload_conf()")
        await self.until("SELECT sync_state FROM pg_stat_replication", "sync")

    async def fail_over(self) -> str:
        """Loses the primary and what is on its way, and promotes the standby; returns where that is."""
        for store in (self.primary, self.standby):
            send(store, signal.SIGKILL)
            await store.stop(signal.SIGKILL)
        await self.standby.start()
        await self.ask("SELECT pg_promote(true, 30)", of=self.standby)
        # The one that is left has no standby to wait for.
        await self.ask("ALTER SYSTEM SET synchronous_standby_names = ''", of=self.standby)
        await self.ask("SELECT pg_reload_conf()", of=self.standby)
        await self.until("SHOW synchronous_standby_names", "", of=self.standby)
        return self.standby.url


async def base_backup(source: Path, target: Path) -> None:
    """Copies a running server's data, as its standby's; both are the folders of their sockets."""
    command = [
        *as_ordinary_user(),
        *(str(BIN / "pg_basebackup"), "-D", str(target / "data"), "-h", str(source), "-U", "postgres"),
        *("-R", "-c", "fast", "-X", "stream", "--no-sync"),
    ]
    environment = {"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD}
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        env=environment,
        capture_output=True,
        timeout=SECONDS,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr


@asynccontextmanager
async def replicated(*, synchronous: bool = True) -> AsyncIterator[Replicated]:
    """Both of them, with every service's schema; commits wait for the standby unless told otherwise."""
    folder = Path(tempfile.mkdtemp(prefix="hm-sr-"))
    homes = [folder / "a", folder / "b"]
    for home in homes:
        home.mkdir(mode=0o700)
    primary = own_postgres(homes[0], homes[0] / "data", homes[0] / "log", "-c", "fsync=off")
    stores = [primary]
    try:
        await primary.start()
        for schema, directory in MIGRATIONS.items():
            await migrate(primary.url, directory, schema=schema)
        await base_backup(homes[0], homes[1])
        standby = own_postgres(homes[1], homes[1] / "data", homes[1] / "log", "-c", "fsync=off")
        stores.append(standby)
        await standby.start()
        pair = Replicated(primary, standby)
        if synchronous:
            await pair.wait_for_standby()
        yield pair
    finally:
        for store in stores:
            if store.process is not None:
                send(store, signal.SIGCONT)
                await store.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)
