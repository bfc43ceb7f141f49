"""What every request goes through: its id, its trace, its error's form, its line in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import Gateway
from gateway.endpoints import Endpoint
from gateway.problems import (
    MethodNotAllowedError,
    NoSuchPathError,
    openai_response,
    problem_response,
    violation,
)
from gateway.refusals import Refusals
from meshkit import tracing
from meshkit.context import (
    FORWARDED_KEY,
    REQUEST_ID_KEY,
    TRACEPARENT_KEY,
    accept_request_id,
    client_var,
    request_id_var,
    run_id_var,
)
from meshkit.errors import HermeshError, InternalError, InvalidArgumentError
from meshkit.floods import Floods
from meshkit.identity import current_identity
from meshkit.proxies import Proxies

_log = structlog.get_logger("gateway.http")

_QUIET = frozenset({"/health", "/ready", "/metrics"})
_STARTED = "hermesh.started"
_ROUTE = "hermesh.route"
_REFUSED = "hermesh.refused"
_REQUEST_ID = REQUEST_ID_KEY.encode()
_TRACEPARENT = TRACEPARENT_KEY.encode()
_FORWARDED = FORWARDED_KEY.encode()
_TRACESTATE = tracing.TRACESTATE_KEY.encode()
_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0)


class HttpMetrics:
    """Figures of the requests."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Registers them; once a registry."""
        self.requests = Counter(
            "hermesh_http_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "hermesh_http_seconds",
            "Time to the start of a response.",
            ["route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts a request whose response began after so many seconds."""
        # A label's child is looked up at a cost; there are few of them.
        children = self._answered.get((method, route, status))
        if children is None:
            children = (self.requests.labels(method, route, str(status)), self.seconds.labels(route))
            self._answered[method, route, status] = children
        children[0].inc()
        children[1].observe(seconds)


class PathApp:
    """Answers all methods of one path."""

    def __init__(self, gateway: Gateway, path: str, endpoints: Sequence[Endpoint]) -> None:
        """Takes the endpoints of one path, each of another method."""
        self._gateway = gateway
        self._path = path
        self._methods = {endpoint.method: endpoint for endpoint in endpoints}
        if "GET" in self._methods:
            self._methods["HEAD"] = self._methods["GET"]
        self._allowed = sorted({*self._methods, "OPTIONS"})
        self._errors = endpoints[0].errors
        self._takes_slashes = ":path}" in path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        scope[_ROUTE] = self._path
        endpoint = self._methods.get(scope["method"])
        form = endpoint.errors if endpoint is not None else self._errors
        try:
            self._check(scope)
            if scope["method"] == "OPTIONS":
                # No other site's page is told more: there is nothing of CORS here.
                await Response(status_code=204, headers={"allow": ", ".join(self._allowed)})(
                    scope, receive, send
                )
                return
            if endpoint is None:
                raise MethodNotAllowedError(self._allowed)
            request = Request(scope, receive)
            if not endpoint.public:
                await self._gateway.identify(request, endpoint.method)
            response = await endpoint.handler(self._gateway, request)
            if scope["method"] == "HEAD" and not isinstance(response, Response):
                response = _Head(endpoint.answers[200].media_type or "")
            await response(scope, receive, send)
        except HermeshError as error:
            if scope.get(_STARTED):
                raise
            scope[_REFUSED] = error.reason == "OVERLOADED"
            render = openai_response if form == "openai" else problem_response
            await render(error)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Refuses what a proxy or a program before us may read as something else than we do."""
        if not self._takes_slashes:
            raw = scope["raw_path"].lower()
            if b"%2f" in raw or b"%5c" in raw:
                raise InvalidArgumentError(message="an escaped slash is taken in the name of a model only")
        for name, _ in scope["headers"]:
            if b"_" in name:
                text = name.decode("latin-1")[:100]
                raise violation(text, "the name of a header has no underscore here; write a hyphen")


class _Head:
    """Answers HEAD where GET would be answered by a stream."""

    def __init__(self, media_type: str) -> None:
        self._media_type = media_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", self._media_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def routes(gateway: Gateway, endpoints: Sequence[Endpoint]) -> list[Route]:
    """Returns the routes of some endpoints, in their order."""
    by_path: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        by_path.setdefault(endpoint.path, []).append(endpoint)
    return [Route(path, PathApp(gateway, path, group)) for path, group in by_path.items()]


async def no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers what no route takes."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 4404, "reason": "no such path"})
        return
    error = NoSuchPathError(message="nothing is served at this path; GET /openapi.json lists what is")
    await problem_response(error)(scope, receive, send)


class Edge:
    """The outermost ASGI application.

    Attributes:
        refusals: What was refused for want of a place; whoever serves this runs its `report`.
    """

    def __init__(
        self, app: ASGIApp, metrics: HttpMetrics, proxies: Proxies, leaving: Callable[[], bool]
    ) -> None:
        """Wraps the router.

        Args:
            app: The router.
            metrics: Figures of the requests.
            proxies: Those before Envoy.
            leaving: Whether this gateway is about to stop: answers then end their connections, so that no
                balancer keeps one for a request that would meet its end.
        """
        self._app = app
        self._metrics = metrics
        self._proxies = proxies
        self._leaving = leaving
        self.refusals = Refusals()
        self._floods = Floods()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request or a WebSocket."""
        offered = traceparent = forwarded = None
        tracestate = ""
        for name, value in scope["headers"]:
            if name == _REQUEST_ID:
                offered = value.decode("latin-1")
            elif name == _TRACEPARENT:
                traceparent = value.decode("latin-1")
            elif name == _TRACESTATE:
                tracestate = value.decode("latin-1")
            elif name == _FORWARDED:
                # Some proxies add a line, others to the last one.
                line = value.decode("latin-1")
                forwarded = f"{forwarded},{line}" if forwarded else line
        client_var.set(self._proxies.client(forwarded, (scope.get("client") or ("",))[0]))
        request_id = accept_request_id(offered)
        request_id_var.set(request_id)
        method = scope.get("method", "WS")
        quiet = scope["path"] in _QUIET
        span = tracing.start_server_span(method, traceparent, tracestate, recorded=not quiet)
        if not quiet:
            # Of what a probe causes nothing is recorded either.
            span.enter()
        exchange = _Exchange(scope, send, request_id.encode(), leaving=self._leaving())
        try:
            await self._app(scope, receive, exchange.send)
        except Exception as error:
            await self._failed(error, exchange, scope, receive)
        finally:
            if span.recording:
                _describe(span, method, scope, exchange.status)
            span.end()
            self._account(exchange, method, scope)
            span.leave()

    async def _failed(self, error: Exception, exchange: _Exchange, scope: Scope, receive: Receive) -> None:
        _log.error("request failed", path=scope["path"], exc_info=error)
        if scope["type"] != "http":
            return
        if exchange.status:
            # Too late for a status: only a cut connection tells the client that this is not the whole answer.
            raise error
        await problem_response(InternalError())(scope, receive, exchange.send)

    def _account(self, exchange: _Exchange, method: str, scope: Scope) -> None:
        path = scope["path"]
        if path in _QUIET:
            return
        route = scope.get(_ROUTE, "none")
        status = exchange.status
        started = exchange.started_at or time.monotonic()
        self._metrics.answered(method, route, status, started - exchange.began)
        if scope.get(_REFUSED):
            self.refusals.add(route)
            log = _log.debug
        else:
            log = _log.warning if status >= 500 else _log.info
        more: dict[str, int] = {}
        if 400 <= status < 500 and current_identity().tenant_id is None:
            # Anybody can have as many of these as they like.
            kind = f"{route} {status}"
            if not self._floods.take(kind):
                return
            more = self._floods.left_out(kind)
        log(
            "request",
            method=method,
            path=path,
            client=client_var.get(),
            status=status,
            first_byte_ms=round((started - exchange.began) * 1000, 1),
            total_ms=round((time.monotonic() - exchange.began) * 1000, 1),
            **more,
        )


def _describe(span: tracing.Span, method: str, scope: Scope, status: int) -> None:
    """Says on a request's span what it was, once that is known."""
    route = scope.get(_ROUTE)
    if route:
        span.rename(f"{method} {route}")
        span.set("http.route", route)
    if scope["type"] == "http":
        span.set("http.request.method", method)
    span.set("http.response.status_code", status)
    span.set("url.path", scope["path"])
    span.set("hermesh.request_id", request_id_var.get())
    tenant_id = current_identity().tenant_id
    if tenant_id is not None:
        span.set("hermesh.tenant_id", str(tenant_id))
    if run_id := run_id_var.get():
        span.set("hermesh.run_id", run_id)
    session_id = scope.get("path_params", {}).get("session_id")
    if session_id:
        span.set("hermesh.session_id", session_id)
    if status >= 500:
        span.fail(str(status))


class _Exchange:
    """Adds what every response has and notes its status."""

    __slots__ = ("_leaving", "_request_id", "_scope", "_send", "began", "started_at", "status")

    def __init__(self, scope: Scope, send: Send, request_id: bytes, *, leaving: bool) -> None:
        self._scope = scope
        self._send = send
        self._request_id = request_id
        self._leaving = leaving
        self.began = time.monotonic()
        self.started_at = 0.0
        self.status = 0

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self.status = message["status"]
            self.started_at = time.monotonic()
            self._scope[_STARTED] = True
            headers: list[Any] = list(message.get("headers", ()))
            headers.append((_REQUEST_ID, self._request_id))
            if self._leaving:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif kind == "websocket.accept":
            self.status = 101
            self.started_at = time.monotonic()
            message = {**message, "headers": [*message.get("headers", ()), (_REQUEST_ID, self._request_id)]}
        await self._send(message)
