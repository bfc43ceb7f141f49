"""Probes: whatever a URL is, the answer is yes or no."""

import pytest
from prometheus_client import CollectorRegistry

from launcher import probes
from meshkit.probes import ProbeServer, Readiness


@pytest.mark.parametrize("url", ["nonsense", "redis://127.0.0.1:1", "redis://127.0.0.1:port", "redis://["])
async def test_no_redis_is_a_no(url: str) -> None:
    assert not await probes.valkey(url)


@pytest.mark.parametrize(
    "url", ["nonsense", "postgresql://127.0.0.1:1/x", "postgresql://127.0.0.1:port/x", "postgresql://["]
)
async def test_no_postgresql_is_a_no(url: str) -> None:
    assert not await probes.postgres(url)


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:1/v1", "http://127.0.0.1:port/v1", "http://["])
async def test_no_model_api_is_a_no(url: str) -> None:
    assert not await probes.model(url, "")


async def test_what_is_wrong_is_said() -> None:
    assert await probes.postgres_problem("postgresql://127.0.0.1:1/x") == "does not answer"
    assert "not a URL" in await probes.postgres_problem("nonsense")
    assert await probes.valkey_problem("redis://:secret@127.0.0.1:1") == "does not answer"
    assert "not a URL" in await probes.valkey_problem("nonsense")
    assert await probes.model_problem("http://127.0.0.1:1/v1", "key") == "does not answer"
    assert "not a URL" in await probes.model_problem("nonsense", "key")
    assert "HERMESH_LLM_API_KEY" in await probes.model_problem("http://127.0.0.1:1/v1", "ключ")


async def test_what_degrades_a_service_is_said() -> None:
    registry = CollectorRegistry()
    wrong: dict[str, str | None] = {"redis": None, "mesh": None}
    readiness = Readiness(registry=registry)

    async def redis() -> str | None:
        return wrong["redis"]

    async def mesh() -> str | None:
        return wrong["mesh"]

    readiness.add("redis", redis)
    readiness.add("mesh", mesh)
    async with ProbeServer("127.0.0.1:0", readiness, registry=registry) as server:
        assert await probes.degraded(server.address) == "starting"
        server.set_ready()
        assert await probes.degraded(server.address) == ""
        wrong["redis"] = "Redis does not answer"
        assert await probes.degraded(server.address) == "redis: Redis does not answer"
        wrong["mesh"] = "the mesh cannot be reached"
        both = "redis: Redis does not answer; mesh: the mesh cannot be reached"
        assert await probes.degraded(server.address) == both
    for address in (server.address, "", "nonsense"):
        assert await probes.degraded(address) == "its /ready does not answer"
