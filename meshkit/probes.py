"""The small HTTP endpoint of every process: /metrics, /health and /ready.

Plain asyncio in place of a web framework: three fixed answers, a bound on everything that a client can make
large or slow, and no import cost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import structlog
from prometheus_client import REGISTRY, CollectorRegistry

from meshkit.lifecycle import bind_failure, reachable
from meshkit.settings import parse_address
from meshkit.tasks import TaskOwner
from meshkit.telemetry import dependency_gauge, render_metrics

_log = structlog.get_logger("meshkit.probes")

_HEADER_LIMIT = 8 * 1024
_IO_TIMEOUT = 5.0
_CHECK_TIMEOUT = 2.0
_MAX_CONNECTIONS = 64
_JSON = "application/json"
# How long /ready waits for a new look.
_PATIENCE = 0.8
# Between two looks that nobody asked for: they keep the gauges true.
_WATCH_SECONDS = 5.0

Check = Callable[[], Awaitable[str | None]]
Answer = tuple[HTTPStatus, str, bytes]


class Readiness:
    """Named checks of what a process needs; each returns None, or why it is not as it should be.

    What they find is also in the gauge `hermesh_dependency_up`, and in the log when it changes.
    """

    def __init__(self, *, timeout: float = _CHECK_TIMEOUT, registry: CollectorRegistry = REGISTRY) -> None:
        """Makes an empty list; each check gets `timeout` seconds."""
        self._checks: dict[str, Check] = {}
        self._own: set[str] = set()
        self._timeout = timeout
        self._gauge = dependency_gauge(registry)
        self._known: dict[str, str | None] = {}

    def add(self, name: str, check: Check, *, own: bool = False) -> None:
        """Adds a check, or replaces that of the same name.

        Args:
            name: What is looked at, one word: `postgresql`, `mesh`.
            check: Returns None, or why it does not work.
            own: It is wrong with this process alone, and another replica would do better. What replicas
                share only degrades: without all of them nobody would even be told what is wrong.
        """
        self._checks[name] = check
        if own:
            self._own.add(name)

    async def problems(self) -> dict[str, str | None]:
        """Runs all checks side by side.

        Returns:
            By name: None if it passed, else a short reason without any driver's text.
        """
        names = list(self._checks)
        results = await asyncio.gather(*(self._run(name, self._checks[name]) for name in names))
        found = dict(zip(names, results, strict=True))
        for name, why in found.items():
            self._note(name, why)
        return found

    async def soon(self, seconds: float = _PATIENCE) -> dict[str, str | None]:
        """As `problems`, but with what the last look found where a part takes its time now.

        Whoever asks for /ready has little patience (Kubernetes: a second), and one that gets no answer takes
        the process out, whatever the answer would have been.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self.problems()
        except TimeoutError:
            return {name: self._known.get(name) for name in self._checks}

    def unfit(self, problems: Mapping[str, str | None]) -> bool:
        """Whether these problems keep this very process from serving."""
        return any(problems.get(name) is not None for name in self._own)

    async def watch(self, seconds: float = _WATCH_SECONDS) -> None:
        """Looks again and again, until cancelled: the gauges are true also where nobody asks for /ready."""
        while True:
            await self.problems()
            await asyncio.sleep(seconds)

    def _note(self, name: str, why: str | None) -> None:
        self._gauge.labels(name).set(why is None)
        known = self._known.get(name)
        self._known[name] = why
        if why is not None and known is None:
            _log.warning("degraded", dependency=name, reason=why)
        elif why is None and known is not None:
            _log.info("no longer degraded", dependency=name)

    async def _run(self, name: str, check: Check) -> str | None:
        try:
            async with asyncio.timeout(self._timeout):
                return await check()
        except TimeoutError:
            return f"no answer within {self._timeout:g} s"
        except Exception as error:
            _log.warning("readiness check failed", check=name, error=type(error).__name__)
            return "the check failed"


class ProbeServer:
    """Serves the probes on an address of its own.

    Example:
        async with ProbeServer(settings.metrics_listen, readiness) as probes:
            ...
    """

    def __init__(
        self,
        listen: str,
        readiness: Readiness | None = None,
        *,
        variable: str = "HERMESH_METRICS_LISTEN",
        registry: CollectorRegistry = REGISTRY,
        io_timeout: float = _IO_TIMEOUT,
    ) -> None:
        """Listens once entered; `variable` is named in the error for an address that cannot be bound."""
        self.readiness = readiness if readiness is not None else Readiness(registry=registry)
        self.address = listen
        self._listen = listen
        self._variable = variable
        self._registry = registry
        self._io_timeout = io_timeout
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()
        self._not_ready: str | None = "starting"
        self._tasks = TaskOwner("probes")

    def set_ready(self, why_not: str | None = None) -> None:
        """Makes /ready depend on the checks, or answer 503 with `why_not` whatever they say."""
        self._not_ready = why_not
        if why_not is None and not len(self._tasks):
            self._tasks.start(self.readiness.watch(), name="readiness")

    async def __aenter__(self) -> Self:
        host, port = parse_address(self._listen)
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_HEADER_LIMIT)
        except OSError as error:
            raise bind_failure(self._listen, self._variable, error) from error
        bound = self._server.sockets[0].getsockname()
        self.address = reachable(host, bound[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tasks.close()
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=1.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._connections) >= _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            async with asyncio.timeout(self._io_timeout):
                method, path = await _read_request(reader)
                status, kind, body = await self._answer(method, path)
                writer.write(_response(status, kind, body, with_body=method != "HEAD"))
                await writer.drain()
        except (OSError, TimeoutError, EOFError, ValueError, asyncio.LimitOverrunError):
            # A client that is slow, gone or talks something else gets nothing more.
            pass
        except Exception:
            _log.exception("probe failed")
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, method: str, path: str) -> Answer:
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _JSON, b'{"error":"use GET"}\n'
        if path == "/health":
            return HTTPStatus.OK, _JSON, b'{"status":"alive"}\n'
        if path == "/metrics":
            body, kind = render_metrics(self._registry)
            return HTTPStatus.OK, kind, body
        if path == "/ready":
            return await self._ready()
        return HTTPStatus.NOT_FOUND, _JSON, b'{"error":"there are /metrics, /health and /ready"}\n'

    async def _ready(self) -> Answer:
        problems = await self.readiness.soon()
        serving = self._not_ready is None and not self.readiness.unfit(problems)
        well = serving and not any(why is not None for why in problems.values())
        document: dict[str, Any] = {
            "status": "ready" if well else "degraded" if serving else "not ready",
            "checks": {name: {"ok": why is None, "reason": why} for name, why in problems.items()},
        }
        if self._not_ready is not None:
            document["reason"] = self._not_ready
        status = HTTPStatus.OK if serving else HTTPStatus.SERVICE_UNAVAILABLE
        return status, _JSON, json.dumps(document).encode() + b"\n"


async def status_of(host: str, port: int, path: str, seconds: float) -> int | None:
    """Asks another process's probe; returns its status, or None if there is no answer within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(host, port, limit=_HEADER_LIMIT)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nhost: hermesh\r\nconnection: close\r\n\r\n".encode())
                return int((await reader.readline()).split(b" ")[1])
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, IndexError):
        return None


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, str]:
    """Reads the head of a request and returns method and path; the rest is of no interest.

    Raises:
        ValueError: It is not HTTP.
        asyncio.LimitOverrunError: It is larger than 8 KiB.
    """
    head = await reader.readuntil(b"\r\n\r\n")
    parts = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise ValueError("not an HTTP/1 request")
    return parts[0], parts[1].partition("?")[0]


def _response(status: HTTPStatus, kind: str, body: bytes, *, with_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        "cache-control: no-store\r\nconnection: close\r\n\r\n"
    ).encode()
    return head + body if with_body else head
