"""What `hermesh doctor` finds in a real Valkey, a real PostgreSQL and their clocks."""

from __future__ import annotations

from pathlib import Path

import redis

from launcher import examine
from launcher.envoy import Admin
from tests.conftest import ValkeyServer


def remedies(rows: list[examine.Row]) -> dict[str, str]:
    return {what: remedy for what, _, remedy in rows}


async def test_a_redis_that_is_well(valkey: ValkeyServer) -> None:
    rows = await examine.redis(valkey.url)
    assert {"Redis's version", "Redis takes writes", "Redis's clock"} <= set(remedies(rows))
    assert set(remedies(rows).values()) == {""}
    assert any(found.startswith("Valkey 9") for _, found, _ in rows)


async def test_a_replica_that_takes_no_writes_and_a_bound_without_eviction(valkey: ValkeyServer) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        client.config_set("maxmemory", 64 << 20)
        client.config_set("maxmemory-policy", "noeviction")
        client.replicaof("127.0.0.1", 1)
        found = remedies(await examine.redis(valkey.url))
    assert found["Redis takes writes"] == "name the primary in HERMESH_REDIS_URL"
    assert "allkeys-lru" in found["Redis's memory"]


async def test_a_redis_that_is_gone_or_refuses_the_password(valkey: ValkeyServer) -> None:
    [(_, said, remedy)] = await examine.redis(valkey.url.replace("test-password", "wrong"))
    assert (said, "valkey-down" in remedy) == ("refuses the user or the password", True)
    valkey.kill()
    [(_, said, _)] = await examine.redis(valkey.url)
    assert said == "does not answer"


async def test_postgresqls_clock_is_this_machines(postgres_url: str) -> None:
    [(what, said, remedy)] = await examine.database_clock(postgres_url)
    assert (what, said, remedy) == ("PostgreSQL's clock", "as this machine's", "")
    assert await examine.database_clock("postgresql://127.0.0.1:1/x") == []


def test_a_clock_that_is_off_is_told_once_it_matters() -> None:
    assert examine.clock("Redis", 100.0, 99.9, 100.1) == ("Redis's clock", "as this machine's", "")
    assert examine.clock("Redis", 100.6, 99.9, 100.0)[1:] == ("0.6 s ahead of this machine's", "")
    _, said, remedy = examine.clock("Redis", 40.0, 99.9, 100.0)
    assert said == "59.9 s behind this machine's"
    assert "NTP" in remedy


def test_versions_below_what_is_needed() -> None:
    assert examine._version({"redis_version": "5.0.14"})[2] == "it needs 6.2 or later"
    assert examine._version({"redis_version": "8.0.1"})[1:] == ("Redis 8.0.1", "")


async def test_an_envoy_that_is_gone(tmp_path: Path) -> None:
    [(what, said, remedy)] = await examine.edge(Admin(tmp_path / "none.sock"))
    assert (what, said) == ("Envoy", "does not answer")
    assert "envoy-down.md" in remedy
