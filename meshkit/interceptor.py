"""The one server interceptor: what happens around every RPC.

In this order: request id, trace, metrics and log line; deadline; identity; a place among the calls; the
arrival of the request and its validation; the method; and every failure turned into a rich status. One
interceptor in place of five, because grpc.aio pays for each one on each RPC; a method's handler is wrapped
once and kept. Streams pay per message for one loop step and nothing else.

Nothing of a request is read before its caller proved who it is, and then it has to arrive in time. gRPC by
itself reads a unary request first, counts a call from its headers on, and waits for the rest for ever:
callers without a key could fill a replica's places and its memory, health checks would find none, and Envoy
would take the replica out of the mesh. So every method is served as one whose requests are a stream, which is
the same on the wire, and the calls are counted here, health checks not among them.
"""

from __future__ import annotations

import asyncio
import hmac
import inspect
import time
from collections.abc import Callable
from typing import Any, NoReturn
from uuid import UUID

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status

from meshkit import tracing
from meshkit.auth import Authenticator, invalid_key
from meshkit.context import (
    FORWARDED_KEY,
    REQUEST_ID_KEY,
    TRACEPARENT_KEY,
    accept_request_id,
    client_var,
    deadline_var,
    peer_var,
    request_id_var,
    run_id_var,
)
from meshkit.errors import (
    CancelledCallError,
    DeadlineError,
    HermeshError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    from_rpc_error,
    to_status,
)
from meshkit.floods import Floods
from meshkit.identity import (
    ANONYMOUS,
    AUTHORIZATION_KEY,
    MESH_TOKEN_KEY,
    PROBE_TENANT,
    TENANT_KEY,
    Identity,
    identity_var,
    require_mesh,
)
from meshkit.proxies import Proxies, peer_address
from meshkit.telemetry import RpcMetrics
from meshkit.validation import validate

_log = structlog.get_logger("meshkit.rpc")

_HEALTH_PREFIX = "/grpc.health.v1.Health/"
_REFLECTION_PREFIX = "/grpc.reflection."
# Services of the mesh only, by the name that their protos give them.
_INTERNAL_SUFFIX = "InternalService"
_BEARER = "bearer "

_STOPPING = "this replica is stopping; try again"
_STOPPING_RETRY_MS = 200

MAX_CALLS = 10_000
_FULL_RETRY_MS = 500
# Health watches and reflection are nobody's work; who opens them needs few.
_MAX_WATCHES = 500
# A health check is a few bytes, from next door.
_HEALTH_SECONDS = 5.0

# Codes that say that we, not the caller, are at fault.
_FAULTS = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of a server."""

    def __init__(
        self,
        *,
        authenticator: Authenticator | None,
        mesh_token: str,
        metrics: RpcMetrics,
        max_calls: int = MAX_CALLS,
        arrival_seconds: float = 20.0,
        proxies: Proxies | None = None,
    ) -> None:
        """Makes the interceptor.

        Args:
            authenticator: For calls with an API key; None refuses them all.
            mesh_token: The mesh's shared secret; calls from the mesh are refused if it is empty.
            metrics: Where RPCs are counted.
            max_calls: Most calls at once whose callers are known; more are refused.
            arrival_seconds: How long a unary request may take to arrive.
            proxies: Those before Envoy, if any.
        """
        self._proxies = proxies or Proxies()
        self._max_calls = max_calls
        self._arrival_seconds = arrival_seconds
        self._calls = 0
        self._floods = Floods()
        self._authenticator = authenticator
        self._mesh_token = mesh_token.encode()
        self._metrics = metrics
        self._wrapped: dict[str, tuple[Any, Any]] = {}
        self._watches: set[asyncio.Task[Any]] = set()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Returns the wrapped handler of a method; None for an unknown one."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        name = handler_call_details.method
        known = self._wrapped.get(name)
        if known is not None and known[0] is handler:
            return known[1]
        wrapped = self._wrap(name, handler)
        self._wrapped[name] = (handler, wrapped)
        return wrapped

    def end_watches(self) -> None:
        """Ends open health watches and reflection streams: they last as long as their clients like."""
        for task in self._watches:
            task.cancel()

    def _wrap(self, name: str, handler: Any) -> Any:
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(name, handler.stream_stream, None),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self._single(name, handler.stream_unary, None),
                handler.request_deserializer,
                handler.response_serializer,
            )
        # gRPC's own answer to bytes that are no message is a bare INTERNAL: they are read here, too.
        read = handler.request_deserializer or _as_is
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(name, handler.unary_stream, read), None, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(
            self._single(name, handler.unary_unary, read), None, handler.response_serializer
        )

    def _single(self, name: str, behavior: Any, read: Callable[[bytes], Any] | None) -> Any:
        if not inspect.iscoroutinefunction(behavior):
            behavior = _unimplemented
        check = _checker(name, read)
        about = _about(read)

        async def serve(request: Any, context: Any) -> Any:
            call = _Call(self, name, context)
            try:
                call.begin()
                await self._admit(call)
                if check is not None:
                    request = check(await self._arrival(call, context))
                    if about is not None:
                        call.about(about(request))
                result = await behavior(request, context)
                call.code = _set_code(context)
                return result
            except BaseException as error:
                await call.fail(error)
            finally:
                call.finish()

        return serve

    def _streaming(self, name: str, behavior: Any, read: Callable[[bytes], Any] | None) -> Any:
        generates = inspect.isasyncgenfunction(behavior)
        if not generates and not inspect.iscoroutinefunction(behavior):
            behavior = _unimplemented
        check = _checker(name, read)
        about = _about(read)
        watches = self._watches if name.startswith((_HEALTH_PREFIX, _REFLECTION_PREFIX)) else None

        async def serve(request: Any, context: Any) -> None:
            call = _Call(self, name, context)
            task = asyncio.current_task() if watches is not None else None
            try:
                call.begin()
                await self._admit(call)
                if watches is not None and task is not None:
                    _watch(watches, task)
                if check is not None:
                    request = check(await self._arrival(call, context))
                    if about is not None:
                        call.about(about(request))
                if generates:
                    write = context.write
                    responses = behavior(request, context)
                    try:
                        async for response in responses:
                            try:
                                await write(response)
                            except grpc.aio.InternalError as error:
                                # The client left while its window was full, or its connection broke.
                                raise asyncio.CancelledError from error
                    finally:
                        # A generator that is only dropped would run its `finally` at some later time.
                        await responses.aclose()
                else:
                    await behavior(request, context)
                call.code = _set_code(context)
            except BaseException as error:
                await call.fail(error)
            finally:
                call.finish()

        return serve

    async def _admit(self, call: _Call) -> None:
        """Finds out who calls and takes a place for the call; a health check needs neither."""
        if call.health:
            return
        await self._identify(call)
        if self._calls >= self._max_calls:
            raise ResourceExhaustedError(
                "OVERLOADED",
                f"{self._max_calls} calls are being served; nothing was done",
                retry_after_ms=_FULL_RETRY_MS,
            )
        self._calls += 1
        call.counted = True

    async def _arrival(self, call: _Call, context: Any) -> bytes:
        """Returns the bytes of a unary request once they are all there."""
        seconds = min(self._arrival_seconds, _HEALTH_SECONDS) if call.health else self._arrival_seconds
        try:
            async with asyncio.timeout(seconds):
                data = await context.read()
        except TimeoutError:
            raise DeadlineError(
                message=f"the request did not arrive within {seconds:g} s; nothing was done"
            ) from None
        if data is grpc.aio.EOF:
            raise CancelledCallError(message="the call ended before its request was complete")
        request: bytes = data
        return request

    async def _identify(self, call: _Call) -> None:
        token = call.metadata.get(MESH_TOKEN_KEY)
        if token is not None:
            identity_var.set(self._mesh_identity(token, call.metadata.get(TENANT_KEY)))
            return
        peer_var.set(peer_address(call.peer()))
        client_var.set(self._proxies.client(_text(call.metadata.get(FORWARDED_KEY)), call.peer()))
        authorization = call.metadata.get(AUTHORIZATION_KEY)
        if authorization is None:
            raise UnauthenticatedError(
                "API_KEY_MISSING", "send an API key in the metadata: authorization: Bearer hm_..."
            )
        if not isinstance(authorization, str) or not authorization[: len(_BEARER)].lower() == _BEARER:
            raise UnauthenticatedError("API_KEY_INVALID", "authorization must be: Bearer hm_...")
        if self._authenticator is None:
            raise invalid_key()
        tenant_id = await self._authenticator.authenticate(authorization[len(_BEARER) :].strip())
        identity_var.set(Identity(tenant_id=tenant_id, mesh=False))
        if call.internal:
            require_mesh()

    def _mesh_identity(self, token: str | bytes, tenant: str | bytes | None) -> Identity:
        offered = token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")
        if not self._mesh_token or not hmac.compare_digest(offered, self._mesh_token):
            raise UnauthenticatedError("API_KEY_INVALID", "the mesh token is not valid")
        if not tenant:
            return Identity(tenant_id=None, mesh=True)
        try:
            return Identity(tenant_id=UUID(str(tenant)), mesh=True)
        except ValueError:
            raise InvalidArgumentError("INVALID_ARGUMENT", f"metadata {TENANT_KEY} is not a UUID") from None


class _Call:
    """One RPC being served: its figures, and how it ends."""

    __slots__ = (
        "_context",
        "_owner",
        "_reason",
        "_request_id",
        "_span",
        "_started",
        "code",
        "counted",
        "health",
        "internal",
        "metadata",
        "name",
    )

    def __init__(self, owner: RpcInterceptor, name: str, context: Any) -> None:
        self.name = name
        self.code = "OK"
        self._owner = owner
        self._context = context
        self._reason = ""
        self._started = time.monotonic()
        self.metadata: dict[str, str | bytes] = dict(context.invocation_metadata() or ())
        self.counted = False
        self.health = name.startswith(_HEALTH_PREFIX)
        self.internal = name[1:].partition("/")[0].endswith(_INTERNAL_SUFFIX)
        # The task is the RPC's own, so that what is set here ends with it.
        self._request_id = accept_request_id(_text(self.metadata.get(REQUEST_ID_KEY)))
        request_id_var.set(self._request_id)
        identity_var.set(ANONYMOUS)
        self._span = tracing.start_server_span(
            name,
            _text(self.metadata.get(TRACEPARENT_KEY)),
            _text(self.metadata.get(tracing.TRACESTATE_KEY)) or "",
            recorded=not self.health,
        )
        self._span.enter()
        owner._metrics.started(name)

    def peer(self) -> str:
        """Returns who is connected, as gRPC names it."""
        peer: str = self._context.peer()
        return peer

    def about(self, what: tuple[str, str]) -> None:
        """Takes which run and session a request is about, where it says so."""
        run_id, session_id = what
        if run_id:
            run_id_var.set(run_id)
        if session_id and self._span.recording:
            self._span.set("hermesh.session_id", session_id)

    def begin(self) -> None:
        """Takes over the deadline and announces the request id.

        Raises:
            DeadlineError: The deadline has passed already: nobody waits for the work.
        """
        self._context.set_trailing_metadata(((REQUEST_ID_KEY, self._request_id),))
        left = self._context.time_remaining()
        if left is None:
            deadline_var.set(None)
            return
        deadline_var.set(self._started + left)
        if left <= 0:
            raise DeadlineError()

    async def fail(self, error: BaseException) -> NoReturn:
        """Ends the RPC with the status of an error; always raises."""
        if isinstance(error, grpc.aio.AbortError):
            self.code = _set_code(self._context)
            raise error
        if isinstance(error, asyncio.CancelledError):
            # Mostly the client left or its deadline passed. But work that was cancelled from inside, at a
            # drain, has a client that still waits: grpc.aio would let it wait for ever.
            await self._abort(UnavailableError(message=_STOPPING, retry_after_ms=_STOPPING_RETRY_MS))
            left = self._context.time_remaining()
            self.code = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
            self._reason = ""
            raise error
        if isinstance(error, grpc.aio.BaseError) and not isinstance(error, grpc.aio.UsageError):
            # A read or write failed under our hands: the client left, which gRPC may not have told yet.
            self.code = "CANCELLED"
            raise asyncio.CancelledError from error
        if not isinstance(error, Exception):
            self.code = "UNKNOWN"
            raise error
        await self._abort(self._map(error))
        raise asyncio.CancelledError from error

    async def _abort(self, error: HermeshError) -> None:
        """Sends a status; returns only if nobody is there to read it."""
        self.code = error.code.name
        self._reason = error.reason
        status = rpc_status.to_status(to_status(error, self._request_id))
        trailers = (*(status.trailing_metadata or ()), (REQUEST_ID_KEY, self._request_id))
        try:
            await self._context.abort(status.code, status.details, trailers)
        except grpc.aio.AbortError:
            raise
        except Exception:
            # gRPC has no better sign of a call that is over than a batch that fails.
            _log.debug("no client to tell", method=self.name[1:], code=self.code)

    def _map(self, error: Exception) -> HermeshError:
        if isinstance(error, HermeshError):
            if isinstance(error, InternalError):
                _log.error("rpc hit a broken invariant", method=self.name[1:], exc_info=error)
            return error
        if isinstance(error, grpc.RpcError):
            mapped = from_rpc_error(error)
            _log.warning("upstream call failed", method=self.name[1:], upstream=_describe(error))
            return mapped
        mapped_driver = _map_driver(error)
        if mapped_driver is not None and not isinstance(mapped_driver, InternalError):
            _log.warning("driver failed", method=self.name[1:], error=type(error).__name__, detail=str(error))
            return mapped_driver
        _log.error("rpc failed unexpectedly", method=self.name[1:], exc_info=error)
        return InternalError()

    def finish(self) -> None:
        """Counts and logs the RPC, ends its span and gives its place back."""
        if self.counted:
            self._owner._calls -= 1
        seconds = time.monotonic() - self._started
        code = self.code
        self._owner._metrics.handled(self.name, code, seconds)
        identity = identity_var.get()
        tenant_id = identity.tenant_id
        span = self._span
        if span.recording:
            span.set("hermesh.request_id", self._request_id)
            if tenant_id is not None:
                span.set("hermesh.tenant_id", str(tenant_id))
            if run_id := run_id_var.get():
                span.set("hermesh.run_id", run_id)
            span.end_rpc(code, failed=code in _FAULTS)
        probe = tenant_id == PROBE_TENANT or self.health
        if probe and code in ("OK", "CANCELLED"):
            # Envoy asks each second, and who depends on us each few: a line each would bury the rest.
            return
        if code in ("OK", "CANCELLED"):
            write = _log.info
        elif code in _FAULTS:
            write = _log.error
        else:
            write = _log.warning
        more: dict[str, str | int] = {"reason": self._reason} if self._reason else {}
        if client := client_var.get():
            more["client"] = client
        if identity == ANONYMOUS and self._reason:
            # Anybody can have as many of these as they like.
            if not self._owner._floods.take(self._reason):
                return
            more.update(self._owner._floods.left_out(self._reason))
        write(
            "rpc",
            method=self.name[1:],
            code=code,
            **more,
            duration_ms=round(seconds * 1000, 2),
            request_id=self._request_id,
            tenant=str(tenant_id) if tenant_id is not None else None,
        )


def _checker(name: str, read: Callable[[bytes], Any] | None) -> Callable[[Any], Any] | None:
    """Returns what turns a unary request's bytes into a valid message."""
    if read is None:
        return None
    if name.startswith((_HEALTH_PREFIX, _REFLECTION_PREFIX)):
        return read

    def check(data: bytes) -> Any:
        try:
            message = read(data)
        except Exception as error:
            raise InvalidArgumentError(
                "INVALID_ARGUMENT", "the request cannot be read: it is not the message that its method takes"
            ) from error
        validate(message)
        return message

    return check


def _about(read: Callable[[bytes], Any] | None) -> Callable[[Any], tuple[str, str]] | None:
    """Returns what finds run and session in a method's requests; None where they name neither."""
    fields = getattr(getattr(getattr(read, "__self__", None), "DESCRIPTOR", None), "fields_by_name", {})
    if "lease" in fields:
        return lambda request: (request.lease.run_id, request.lease.session_id)
    if "run_id" in fields and "session_id" in fields:
        return lambda request: (request.run_id, request.session_id)
    if "run_id" in fields:
        return lambda request: (request.run_id, "")
    if "call_id" in fields:
        # run:step:index
        return lambda request: (request.call_id.partition(":")[0], "")
    if "session_id" in fields:
        return lambda request: ("", request.session_id)
    return None


def _watch(watches: set[asyncio.Task[Any]], task: asyncio.Task[Any]) -> None:
    if len(watches) >= _MAX_WATCHES:
        raise ResourceExhaustedError(
            "OVERLOADED", f"{_MAX_WATCHES} watches are open; nothing was done", retry_after_ms=_FULL_RETRY_MS
        )
    watches.add(task)
    task.add_done_callback(watches.discard)


def _as_is(data: bytes) -> bytes:
    return data


async def _unimplemented(_request: Any, _context: Any) -> NoReturn:
    raise UnimplementedError("UNIMPLEMENTED", "this method is not served by this version")


def _set_code(context: Any) -> str:
    """Returns the code that a servicer set by hand, or OK."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _CODE_NAMES.get(code, "OK") if isinstance(code, int) else "OK"


_CODE_NAMES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def _text(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) else None


def _describe(error: grpc.RpcError) -> str:
    code = getattr(error, "code", None)
    details = getattr(error, "details", None)
    return f"{code() if callable(code) else '?'}: {details() if callable(details) else ''}"


def _map_driver(error: Exception) -> HermeshError | None:
    """Maps what a store's driver raised; None if no driver is involved.

    By module name and by traceback, so that a process without a database does not import its driver.
    """
    module = type(error).__module__.partition(".")[0]
    driver = module if module in ("asyncpg", "redis") else _driver_in(error)
    if driver == "asyncpg":
        from meshkit.postgres import map_pg_error

        return map_pg_error(error)
    if driver == "redis":
        return UnavailableError("SERVICE_UNAVAILABLE", retry_after_ms=500)
    return None


def _driver_in(error: Exception) -> str:
    """Returns the driver in whose frames a plain OSError or TimeoutError began, or an empty string."""
    if not isinstance(error, OSError | TimeoutError):
        return ""
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if module in ("asyncpg", "redis"):
            return module
        trace = trace.tb_next
    return ""
