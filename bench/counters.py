"""What the stores of a mesh have done so far, by their own count, and what PostgreSQL can do at most."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import asyncpg
import redis.asyncio

from bench.mesh import Mesh

CONNECTIONS = 32
# Backends report what they did at the end of a transaction, at most once a second.
REPORT_SECONDS = 1.2


@dataclass(frozen=True, slots=True)
class Counts:
    """Transactions that PostgreSQL committed, and commands that Valkey or Redis carried out."""

    commits: int
    commands: int


def url_of(mesh: Mesh, name: str) -> str:
    """Where a store of the mesh is."""
    return mesh.command("env", name).strip()


async def counts(database: str, cache: str) -> Counts:
    """Reads both counters; the reading itself is among them."""
    await asyncio.sleep(REPORT_SECONDS)
    connection = await asyncpg.connect(database)
    try:
        commits = await connection.fetchval(
            "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        )
    finally:
        await connection.close()
    client = redis.asyncio.from_url(cache)
    try:
        facts = await client.info("stats")
    finally:
        await client.aclose()
    return Counts(int(commits), int(facts["total_commands_processed"]))


async def commit_rate(database: str, seconds: float) -> float:
    """Returns how many one-row transactions a second PostgreSQL commits for 32 connections at once."""
    connections = await asyncio.gather(*(asyncpg.connect(database) for _ in range(CONNECTIONS)))
    first = connections[0]
    await first.execute("CREATE TABLE IF NOT EXISTS bench_commits (number bigint)")
    try:
        until = time.monotonic() + seconds

        async def commit(connection: asyncpg.Connection) -> int:
            done = 0
            while time.monotonic() < until:
                await connection.execute("INSERT INTO bench_commits VALUES ($1)", done)
                done += 1
            return done

        began = time.monotonic()
        done = await asyncio.gather(*(commit(connection) for connection in connections))
        return sum(done) / (time.monotonic() - began)
    finally:
        await first.execute("DROP TABLE bench_commits")
        for connection in connections:
            await connection.close()
