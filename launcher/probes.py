"""Does a part answer? The same questions for an embedded part and for one that a URL names."""

from __future__ import annotations

import asyncio

SECONDS = 2.0

# The drivers are imported where they are used: most commands of `hermesh` ask nothing of them.


async def postgres(url: str) -> bool:
    """Whether PostgreSQL takes connections with these credentials."""
    import asyncpg

    try:
        async with asyncio.timeout(SECONDS):
            connection = await asyncpg.connect(url)
            try:
                await connection.fetchval("SELECT 1")
            finally:
                connection.terminate()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError):
        return False
    return True


async def valkey(url: str) -> bool:
    """Whether Valkey or Redis answers a PING with these credentials."""
    import redis.asyncio
    from redis.exceptions import RedisError

    try:
        client = redis.asyncio.Redis.from_url(url, socket_timeout=SECONDS, socket_connect_timeout=SECONDS)
    except ValueError:
        return False
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()


async def model(base_url: str, api_key: str) -> bool:
    """Whether the model API lists models with this key."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # The embedded model is on this machine: no certificates are read for it, and no proxy is asked.
        outside = not base_url.startswith("http://127.0.0.1:")
        async with httpx.AsyncClient(timeout=SECONDS, verify=outside, trust_env=outside) as client:
            answer = await client.get(f"{base_url.rstrip('/')}/models", headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return answer.status_code < 400
