"""What `hermesh doctor` finds in the parts that run: Redis, Envoy, and whose clock says what.

Each row is what was looked at, what was found, and the remedy, which is empty where all is well. None holds
credentials.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from launcher import envoy, probes
from launcher.envoy import Admin

Row = tuple[str, str, str]

# XADD with ids of one's own, and scripts: any that is still maintained.
REDIS_OLDEST = (6, 2)
# What a clock may be off without anything looking odd: times of events are the agents', their order is not.
SKEW_SECONDS = 1.0
_SECONDS = 2.0
_PROBE_KEY = "hermesh:doctor"


async def redis(url: str) -> list[Row]:
    """Looks at a Redis or Valkey: its version, whether it takes writes, what it does when full, its clock."""
    import redis.asyncio as driver
    from redis.exceptions import RedisError

    problem = await probes.valkey_problem(url)
    if problem:
        return [("Redis", problem, "the mesh goes on without it, slower: docs/runbooks/valkey-down.md")]
    client = driver.Redis.from_url(url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS)
    try:
        info: Mapping[str, object] = await client.info()
        rows = [_version(info), *_memory(info)]
        try:
            await client.set(_PROBE_KEY, b"1", px=1000)
            rows.append(("Redis takes writes", "yes", ""))
        except RedisError as error:
            role = info.get("role", "")
            remedy = "name the primary in HERMESH_REDIS_URL" if role == "slave" else "see its own log"
            rows.append(("Redis takes writes", f"no: {str(error)[:100]}", remedy))
        before = time.time()
        seconds, micros = await client.time()
        rows.append(clock("Redis", seconds + micros / 1e6, before, time.time()))
        return rows
    except (RedisError, OSError, ValueError) as error:
        return [("Redis", f"cannot be looked at: {str(error)[:100]}", "its user needs INFO, TIME and SET")]
    finally:
        await client.aclose()


def _version(info: Mapping[str, object]) -> Row:
    name = "Valkey" if "valkey_version" in info else "Redis"
    text = str(info.get("valkey_version") or info.get("redis_version") or "unknown")
    try:
        found = tuple(int(part) for part in text.split(".")[:2])
    except ValueError:
        found = REDIS_OLDEST
    oldest = ".".join(map(str, REDIS_OLDEST))
    return (
        "Redis's version",
        f"{name} {text}",
        "" if found >= REDIS_OLDEST else f"it needs {oldest} or later",
    )


def _memory(info: Mapping[str, object]) -> list[Row]:
    """What it does when its memory is used up; without a bound of its own nothing is looked at."""
    most = int(str(info.get("maxmemory") or 0))
    policy = str(info.get("maxmemory_policy") or "noeviction")
    if not most:
        return []
    remedy = ""
    if policy == "noeviction":
        remedy = (
            "set maxmemory-policy allkeys-lru: nothing in it has to stay, and a full one refuses all writes"
        )
    return [("Redis's memory", f"{most >> 20} MiB at most, then {policy}", remedy)]


async def database_clock(url: str) -> list[Row]:
    """Compares PostgreSQL's clock, which decides about leases, with this machine's."""
    import asyncpg

    try:
        async with asyncio.timeout(_SECONDS):
            connection = await asyncpg.connect(url)
            try:
                before = time.time()
                there = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
                return [clock("PostgreSQL", there, before, time.time())]
            finally:
                connection.terminate()
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return []  # that it does not answer is said elsewhere


def clock(whose: str, there: float, before: float, after: float) -> Row:
    """Says how far a clock is from this machine's, which was read before and after it was asked."""
    off = there - after if there > after else there - before if there < before else 0.0
    found = (
        f"{abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} this machine's"
        if off
        else "as this machine's"
    )
    remedy = ""
    if abs(off) > SKEW_SECONDS:
        remedy = "have both machines follow one time server (NTP): events would be dated wrong"
    return (f"{whose}'s clock", found, remedy)


async def edge(admin: Admin) -> list[Row]:
    """Looks at the Envoy that runs: whether it answers, and which service it finds no healthy replica of."""
    if not await admin.answers():
        return [("Envoy", "does not answer", "see docs/runbooks/envoy-down.md")]
    version = await admin.version()
    rows: list[Row] = [("Envoy", version or "runs", "")]
    healthy = await admin.healthy()
    for service in envoy.CLUSTERS:
        places = [well for place, well in healthy.items() if place.startswith(f"{service}/")]
        remedy = "" if any(places) else "none gets calls: hermesh status; docs/runbooks/replica-down.md"
        rows.append(
            (f"Envoy's view of {service}", f"{sum(places)} of {len(places)} replicas healthy", remedy)
        )
    return rows
