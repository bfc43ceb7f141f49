"""Does a part answer, and if not, why? The same for an embedded part and for one that a URL names.

Each question has two forms: whether it answers, and in a few words what is wrong (empty for nothing). The
words hold no credentials.
"""

from __future__ import annotations

import asyncio

SECONDS = 2.0
NO_ANSWER = "does not answer"

# The drivers are imported where they are used: most commands of `hermesh` ask nothing of them.


async def alive(address: str) -> bool:
    """Whether a service's event loop runs: 200 from /health at its metrics address."""
    from meshkit.probes import status_of

    host, _, port = address.rpartition(":")
    return port.isdigit() and await status_of(host.strip("[]"), int(port), "/health", SECONDS) == 200


async def postgres(url: str) -> bool:
    """Whether PostgreSQL takes connections with these credentials."""
    return not await postgres_problem(url)


async def postgres_problem(url: str) -> str:
    """Why PostgreSQL does not take connections with these credentials."""
    import asyncpg

    from meshkit.hosts import Hosts, NoPrimaryError

    try:
        async with asyncio.timeout(SECONDS):
            connection = await Hosts(url).connect(statement_cache_size=0)
            try:
                await connection.fetchval("SELECT 1")
            finally:
                connection.terminate()
    except (asyncpg.InvalidPasswordError, asyncpg.InvalidAuthorizationSpecificationError):
        return "refuses the user or the password"
    except asyncpg.InvalidCatalogNameError:
        return "has no such database"
    except NoPrimaryError:
        return "has no primary"
    except (OSError, TimeoutError, asyncpg.PostgresError):
        return NO_ANSWER
    except (asyncpg.InterfaceError, ValueError):
        return "is not a URL of PostgreSQL's"
    return ""


async def valkey(url: str) -> bool:
    """Whether Valkey or Redis answers a PING with these credentials."""
    return not await valkey_problem(url)


async def valkey_problem(url: str) -> str:
    """Why Valkey or Redis, or one server of a cluster, does not answer a PING with these credentials."""
    from meshkit.errors import StartupError
    from meshkit.redis_servers import REDIS_ERRORS, open_redis
    from meshkit.redis_trouble import explain

    try:
        servers = open_redis(url)
    except StartupError:
        servers = None
    if servers is None:
        return "is not a URL of Redis's"
    link = servers.link(servers.tags[0], timeout=SECONDS)
    try:
        await link.redis.ping()
    except REDIS_ERRORS as error:
        trouble = explain(error)
        if trouble is None or trouble.cause in ("connection", "timeout"):
            return NO_ANSWER
        refused = trouble.cause == "password"
        return "refuses the user or the password" if refused else f"cannot be used: {trouble.text}"
    finally:
        await link.aclose()
        await servers.aclose()
    return ""


async def objects_problem(url: str) -> str:
    """Why nothing can be written to an object store."""
    import obstore

    from meshkit.errors import StartupError
    from meshkit.objects import FAILURES, open_store, predicate

    try:
        async with asyncio.timeout(2 * SECONDS):
            await obstore.put_async(open_store(url), "tool-results/probe", b"")
    except TimeoutError:
        return NO_ANSWER
    except FAILURES as error:
        return predicate(error)
    except StartupError as error:
        return f"cannot be used: {error}"
    return ""


async def degraded(metrics_address: str) -> str:
    """Why a service is degraded or not ready, as its own /ready says; empty when it is neither."""
    import httpx

    inside = httpx.AsyncClient(timeout=SECONDS + 1.0, verify=False, trust_env=False)  # noqa: S501 -- plain HTTP
    try:
        async with inside as client:
            found = (await client.get(f"http://{metrics_address}/ready")).json()
        if found["status"] == "ready":
            return ""
        wrong = [f"{name}: {check['reason']}" for name, check in found["checks"].items() if not check["ok"]]
        return "; ".join(wrong) or str(found.get("reason", found["status"]))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError):
        return "its /ready does not answer"


async def model(base_url: str, api_key: str) -> bool:
    """Whether the model API lists models with this key."""
    return not await model_problem(base_url, api_key)


async def model_problem(base_url: str, api_key: str) -> str:
    """Why the model API does not list models with this key."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # The embedded model is on this machine: no certificates are read for it, and no proxy is asked.
        outside = not base_url.startswith("http://127.0.0.1:")
        async with httpx.AsyncClient(timeout=SECONDS, verify=outside, trust_env=outside) as client:
            answer = await client.get(f"{base_url.rstrip('/')}/models", headers=headers)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        return "is not a URL of an HTTP API"
    except httpx.HTTPError:
        return NO_ANSWER
    except UnicodeEncodeError:
        return "takes keys of ASCII characters only, and HERMESH_LLM_API_KEY has others"
    if answer.status_code in (401, 403):
        return "refuses HERMESH_LLM_API_KEY"
    return f"answers {answer.status_code} to /models" if answer.status_code >= 400 else ""
