"""Faults of PostgreSQL and Valkey that are no crash: frozen, locked, full, slow, shut to their clients, or
back with what they held a while ago."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import redis.asyncio
import redis.exceptions

from meshkit.postgres import load_sql
from tests.chaos.faults.faults import LEASE_TTL, Stage, on_route

_SQL = load_sql(Path(__file__).parent, "intruder.sql")
# A client that takes what it can get without end would prove nothing more.
_MOST_CONNECTIONS = 400
_AT_ONCE = 20
# The last is what the driver says of a connection that ended between two of its own messages.
_ERRORS = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


@asynccontextmanager
async def _intruder(stage: Stage) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection of somebody's who is no part of the mesh, past the proxy."""
    connection = await asyncpg.connect(stage.cluster.postgres.url, timeout=10)
    try:
        yield connection
    finally:
        connection.terminate()


async def postgres_frozen(stage: Stage) -> None:
    """SIGSTOP of every process of PostgreSQL, for less or for more than a lease lasts."""
    seconds = stage.rng.choice([stage.rng.uniform(0.5, 5), LEASE_TTL + stage.rng.uniform(1, 5)])
    postgres = stage.cluster.postgres
    async with postgres.down, stage.broken("freeze", "postgres", f"{seconds:.1f} s"):
        postgres.send_all(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            postgres.send_all(signal.SIGCONT)


async def postgres_locked(stage: Stage) -> None:
    """A transaction that does nothing holds a few rows of leases, or of runs, longer than anybody waits."""
    what = stage.rng.choice(["lock_leases", "lock_leases", "lock_runs"])
    seconds = stage.rng.uniform(2, 12)
    async with stage.broken("lock", "postgres", f"{what} {seconds:.1f} s"):
        with suppress(*_ERRORS):
            async with _intruder(stage) as connection, connection.transaction():
                rows = await connection.fetch(_SQL[what], stage.rng.randint(1, 3))
                stage.recorder.write("mark", text=f"locked {[str(row[0]) for row in rows]}")
                await asyncio.sleep(seconds)


async def postgres_full(stage: Stage) -> None:
    """Somebody takes every connection that PostgreSQL has to give; the mesh's own are ended meanwhile."""
    taken: list[asyncpg.Connection[asyncpg.Record]] = []
    seconds = stage.rng.uniform(1, 5)
    postgres = stage.cluster.postgres
    async with postgres.down, stage.broken("connections", "postgres", f"{seconds:.1f} s"):
        try:
            await _take_all(postgres.url, taken)
            if taken:
                with suppress(*_ERRORS):
                    await taken[0].fetch(_SQL["terminate_others"], [one.get_server_pid() for one in taken])
            # Who comes back first is drawn by the machine.
            await _take_all(postgres.url, taken)
            stage.recorder.write("mark", text=f"{len(taken)} connections were taken")
            await asyncio.sleep(seconds)
        finally:
            for connection in taken:
                connection.terminate()


async def _take_all(url: str, taken: list[asyncpg.Connection[asyncpg.Record]]) -> None:
    while len(taken) < _MOST_CONNECTIONS:
        some = [asyncpg.connect(url, timeout=10) for _ in range(_AT_ONCE)]
        answers = await asyncio.gather(*some, return_exceptions=True)
        taken += [answer for answer in answers if isinstance(answer, asyncpg.Connection)]
        if any(isinstance(answer, BaseException) for answer in answers):
            return


async def postgres_terminated(stage: Stage) -> None:
    """`pg_terminate_backend` of every client's backend, again and again."""
    times = stage.rng.randint(1, 4)
    async with stage.broken("terminate", "postgres", f"{times} times"):
        for _ in range(times):
            with suppress(*_ERRORS):
                async with _intruder(stage) as connection:
                    await connection.fetch(_SQL["terminate_others"], [])
            await asyncio.sleep(stage.rng.uniform(0.05, 0.8))


# Valkey


@asynccontextmanager
async def _valkey(stage: Stage) -> AsyncIterator[redis.asyncio.Redis]:
    """A connection past the proxy; what goes wrong on it is noted and no error of the suite."""
    # Long: what is changed on it has to be put back, on a busy machine, too.
    client = redis.asyncio.Redis.from_url(stage.cluster.valkey.url, socket_timeout=30)
    try:
        yield client
    except (redis.exceptions.RedisError, OSError) as error:
        stage.recorder.write("mark", text=f"Valkey: {type(error).__name__}")
    finally:
        await client.aclose()


async def valkey_full(stage: Stage) -> None:
    """No memory is left, and nothing may be thrown out for what is new."""
    seconds = stage.rng.uniform(1, 6)
    async with stage.cluster.valkey.down, stage.broken("full", "valkey", f"{seconds:.1f} s"):
        async with _valkey(stage) as client:
            before = await client.config_get("maxmemory*")
            try:
                await client.config_set("maxmemory-policy", "noeviction")
                await client.config_set("maxmemory", 1)
                await asyncio.sleep(seconds)
            finally:
                for name in ("maxmemory", "maxmemory-policy"):
                    await client.config_set(name, before[name])


async def valkey_slow(stage: Stage) -> None:
    """Every answer takes longer than anybody waits for it."""
    await on_route(stage, "valkey", "delay", stage.rng.uniform(2, 7), delays=(0.1, 0.6))


async def valkey_password(stage: Stage) -> None:
    """The password is another for a while, and every connection has to say it anew."""
    seconds = stage.rng.uniform(1, 6)
    async with stage.cluster.valkey.down, stage.broken("password", "valkey", f"{seconds:.1f} s"):
        async with _valkey(stage) as client:
            mine = (await client.config_get("requirepass"))["requirepass"]
            try:
                await client.config_set("requirepass", "another-password")
                await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await asyncio.sleep(seconds)
            finally:
                # On the same connection, which needs no password any more.
                await client.config_set("requirepass", mine)


async def valkey_stale(stage: Stage) -> None:
    """Valkey is back with a dump of a while ago: fences and streams of then, and runs that ended since."""
    old, away = stage.rng.uniform(1.5, 4), stage.rng.uniform(0.1, 1)
    valkey = stage.cluster.valkey
    dump = valkey.socket.parent / "dump.rdb"
    async with valkey.down, stage.broken("stale", "valkey", f"{old:.1f} s old, away for {away:.1f} s"):
        async with _valkey(stage) as client:
            await client.save()
        await asyncio.sleep(old)
        await valkey.stop(signal.SIGKILL)
        try:
            await asyncio.sleep(away)
        finally:
            await valkey.start()
            # The next one to kill it finds it empty, as ever.
            dump.unlink(missing_ok=True)
