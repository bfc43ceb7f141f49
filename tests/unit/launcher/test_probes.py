"""Probes: whatever a URL is, the answer is yes or no."""

import pytest

from launcher import probes


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
