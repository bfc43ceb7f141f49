"""W3C trace context across every hop, and spans where an exporter is configured.

Without an exporter this is propagation only: a few string operations a call, and OpenTelemetry's SDK is not
even imported. With `OTEL_EXPORTER_OTLP_ENDPOINT` (or its traces variant) spans go out by OTLP over HTTP; with
`HERMESH_TRACE_FILE` they are appended to a file as JSON lines.

A trace begins where a caller comes in, at a gateway or a service, or where code says so with `span`. A call
that the process makes of itself (a probe, a renewal of leases) belongs to none and is recorded at neither
end.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

from meshkit.context import TRACEPARENT_KEY
from meshkit.errors import StartupError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanContext, Tracer

TRACESTATE_KEY = "tracestate"
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACESTATE = 512
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A position in a trace: what `traceparent` says."""

    trace_id: str
    span_id: str
    flags: int = 0
    state: str = ""

    @property
    def traceparent(self) -> str:
        """The value of the `traceparent` header."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


_current: ContextVar[TraceContext | None] = ContextVar("hermesh_trace", default=None)
# Span ids need no secrecy, but must differ between processes forked from one.
_random = random.Random()  # noqa: S311
os.register_at_fork(after_in_child=_random.seed)


def parse_traceparent(text: str | None, state: str = "") -> TraceContext | None:
    """Reads a `traceparent` header; None if there is none or it breaks the rules of W3C trace context."""
    if not text:
        return None
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    if len(state) > _MAX_TRACESTATE or not state.isprintable():
        state = ""
    return TraceContext(trace_id, span_id, int(flags, 16) & _SAMPLED, state)


def current_trace() -> TraceContext | None:
    """Returns the trace of what is being served, or None."""
    return _current.get()


def current_trace_id() -> str:
    """Returns the trace id of what is being served as 32 hex digits, or an empty string."""
    context = _current.get()
    return context.trace_id if context is not None else ""


def current_traceparent() -> str:
    """Returns a `traceparent` for a call that is made by hand (HTTP): the current one, or a new root."""
    context = _current.get()
    return (context if context is not None else _child(None)).traceparent


def _child(parent: TraceContext | None) -> TraceContext:
    span_id = f"{_random.getrandbits(64) or 1:016x}"
    if parent is None:
        return TraceContext(f"{_random.getrandbits(128) or 1:032x}", span_id)
    return TraceContext(parent.trace_id, span_id, parent.flags, parent.state)


class _State:
    """The process's one tracer, if any."""

    tracer: Tracer | None = None


Value = str | int | float | bool | Sequence[str]


class Span(AbstractContextManager["Span"]):
    """A span under way; it records nothing unless tracing is configured.

    As a context manager it is the current span of the block and ends with it, as failed if an error left it.
    """

    __slots__ = ("_otel", "_token", "context")

    def __init__(self, context: TraceContext, otel: OtelSpan | None) -> None:
        """Wraps a position in the trace and, if one is recorded, OpenTelemetry's span."""
        self.context = context
        self._otel = otel
        self._token: Token[TraceContext | None] | None = None

    @property
    def recording(self) -> bool:
        """True if the span will be exported."""
        return self._otel is not None

    @property
    def traceparent(self) -> str:
        """The header that makes a callee's span this one's child."""
        return self.context.traceparent

    def set(self, key: str, value: Value) -> None:
        """Sets an attribute."""
        if self._otel is not None:
            self._otel.set_attribute(key, value)

    def rename(self, name: str) -> None:
        """Gives it the name that only its end knows."""
        if self._otel is not None:
            self._otel.update_name(name)

    def fail(self, kind: str) -> None:
        """Marks it as failed; `kind` is one of few words, the attribute `error.type`."""
        if self._otel is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._otel.set_attribute("error.type", kind)
        self._otel.set_status(Status(StatusCode.ERROR, kind))

    def enter(self) -> None:
        """Makes this span the current one of the running task."""
        self._token = _current.set(self.context)

    def leave(self) -> None:
        """Makes the span before `enter` the current one again."""
        if self._token is not None:
            _current.reset(self._token)
            self._token = None

    def end(self) -> None:
        """Ends the span; only the first call counts."""
        otel, self._otel = self._otel, None
        if otel is not None:
            otel.end()

    def end_rpc(self, code: str, *, failed: bool = False) -> None:
        """Ends the span of an RPC with its status."""
        self.set("rpc.response.status_code", code)
        if failed:
            self.fail(code)
        self.end()

    def end_with(self, call: Any) -> None:
        """Ends the span when a grpc.aio call does, with its code."""
        call.add_done_callback(self._call_done)

    def _call_done(self, call: Any) -> None:
        # The call is done, so that its coroutine has the code at hand and ends at the first step.
        reading = call.code()
        code = grpc.StatusCode.UNKNOWN
        try:
            reading.send(None)
        except StopIteration as stop:
            code = stop.value or grpc.StatusCode.UNKNOWN
        finally:
            reading.close()
        self.end_rpc(code.name, failed=code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED))

    def __enter__(self) -> Span:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        self.leave()
        self.end()


class _NoSpan(Span):
    """What `span` gives while nothing is recorded: one for all, since it holds nothing."""

    __slots__ = ()

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        return None


NO_SPAN = _NoSpan(TraceContext("0" * 32, "0" * 16), None)

ClientSpan = Span


def enabled() -> bool:
    """Whether spans go anywhere at all."""
    return _State.tracer is not None


def recording() -> bool:
    """Whether what is being worked on is recorded, so that others should hear of its trace."""
    return _State.tracer is not None and (context := _current.get()) is not None and context.flags == _SAMPLED


def start_server_span(
    name: str, traceparent: str | None, tracestate: str = "", *, recorded: bool = True
) -> Span:
    """Starts the span of a request being served, below the caller's.

    Args:
        name: The RPC's method, or what it is otherwise.
        traceparent: The caller's.
        tracestate: The caller's.
        recorded: False for what nobody wants to see, such as health checks.
    """
    parent = parse_traceparent(traceparent, tracestate)
    tracer = _State.tracer
    if tracer is None or not recorded:
        return Span(_child(parent), None)
    return _start_recorded(tracer, name.lstrip("/"), parent, "server", _rpc(name))


def start_client_span(method: str) -> Span:
    """Starts the span of a call to another service, below the current one; without one it is not recorded."""
    parent = _current.get()
    tracer = _State.tracer
    if tracer is None or parent is None:
        return Span(_child(parent), None)
    return _start_recorded(tracer, method.lstrip("/"), parent, "client", _rpc(method))


def _rpc(method: str) -> Mapping[str, Value]:
    if not method.startswith("/"):
        return {}
    return {"rpc.system.name": "grpc", "rpc.method": method[1:]}


def span(
    name: str,
    attributes: Mapping[str, Value] | None = None,
    *,
    kind: str = "internal",
    parent: TraceContext | None = None,
    links: Sequence[TraceContext] = (),
) -> Span:
    """Records a piece of work, below the current span or another one.

    Args:
        name: What it is, one of few.
        attributes: What it is about.
        kind: "internal", or "client" for a call to something that is no service of the mesh.
        parent: Below which span, if not the current one.
        links: Spans that led to it.

    Example:
        with tracing.span("embed", {"hermesh.texts": 3}):
            ...
    """
    tracer = _State.tracer
    if tracer is None:
        return NO_SPAN
    return _start_recorded(tracer, name, parent or _current.get(), kind, attributes or {}, links)


def span_below(
    traceparent: str, name: str, attributes: Mapping[str, Value] | None = None, *, kind: str = "internal"
) -> Span:
    """Records work that a span of another process led to; without that span's traceparent, nothing."""
    parent = parse_traceparent(traceparent)
    return NO_SPAN if parent is None else span(name, attributes, kind=kind, parent=parent)


def _start_recorded(
    tracer: Tracer,
    name: str,
    parent: TraceContext | None,
    kind: str,
    attributes: Mapping[str, Value],
    links: Sequence[TraceContext] = (),
) -> Span:
    from opentelemetry import trace
    from opentelemetry.context import Context

    context = Context()
    if parent is not None:
        remote = trace.NonRecordingSpan(_identity(parent, is_remote=kind == "server"))
        context = trace.set_span_in_context(remote, context)
    kinds = {"server": trace.SpanKind.SERVER, "client": trace.SpanKind.CLIENT}
    started = tracer.start_span(
        name,
        context=context,
        kind=kinds.get(kind, trace.SpanKind.INTERNAL),
        attributes=dict(attributes),
        links=[trace.Link(_identity(link, is_remote=True)) for link in links],
    )
    identity = started.get_span_context()
    position = TraceContext(
        f"{identity.trace_id:032x}",
        f"{identity.span_id:016x}",
        int(identity.trace_flags) & _SAMPLED,
        parent.state if parent is not None else "",
    )
    return Span(position, started if started.is_recording() else None)


def sdk_context() -> Context:
    """Returns the current position in the form that OpenTelemetry's SDK takes; empty without one."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    current = _current.get()
    if current is None:
        return Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(_identity(current, is_remote=False)), Context())


def _identity(context: TraceContext, *, is_remote: bool) -> SpanContext:
    from opentelemetry import trace

    return trace.SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=is_remote,
        trace_flags=trace.TraceFlags(context.flags),
    )


def configure(
    service: str, replica: str, trace_file: Path | None = None, ratio: float = 1.0
) -> Callable[[], None]:
    """Turns tracing on if an exporter is configured.

    Args:
        service: Becomes `service.name`.
        replica: Becomes `service.instance.id`.
        trace_file: File that gets finished spans as JSON lines.
        ratio: How many of the traces that begin here are recorded, 0 to 1; `OTEL_TRACES_SAMPLER` goes before.

    Returns:
        A function that flushes and ends tracing; it blocks for at most a few seconds.

    Raises:
        StartupError: The file cannot be written.
    """
    otlp = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    if trace_file is None and not otlp:
        return _nothing
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    resource = Resource.create({"service.name": f"hermesh-{service}", "service.instance.id": replica})
    provider = TracerProvider(sampler=_sampler(ratio), resource=resource, shutdown_on_exit=False)
    if trace_file is not None:
        provider.add_span_processor(SimpleSpanProcessor(_file_exporter(trace_file, service, replica)))
    if otlp:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=3)))
    tracer = provider.get_tracer("meshkit")
    _State.tracer = tracer

    def end() -> None:
        if _State.tracer is tracer:
            _State.tracer = None
        provider.shutdown()

    return end


def _nothing() -> None:
    return None


def _sampler(ratio: float) -> Sampler | None:
    """Returns what decides about traces that begin here; None leaves it to the SDK's own variables."""
    if os.environ.get("OTEL_TRACES_SAMPLER"):
        return None
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    return ParentBased(TraceIdRatioBased(ratio))


def _file_exporter(path: Path, service: str, replica: str) -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class FileExporter(SpanExporter):
        """Appends spans to a file, one write a line, so that processes may share it."""

        def __init__(self) -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            except OSError as error:
                cause = (error.strerror or str(error)).lower()
                raise StartupError(f"cannot write {path} (HERMESH_TRACE_FILE): {cause}") from error

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            try:
                for item in spans:
                    os.write(self._fd, _line(item, service, replica))
            except OSError:
                return SpanExportResult.FAILURE
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    return FileExporter()


def _line(item: ReadableSpan, service: str, replica: str) -> bytes:
    context = item.get_span_context()
    record = {
        "name": item.name,
        "kind": item.kind.name.lower(),
        "service": service,
        "replica": replica,
        "trace_id": f"{context.trace_id:032x}" if context else "",
        "span_id": f"{context.span_id:016x}" if context else "",
        "parent_span_id": f"{item.parent.span_id:016x}" if item.parent else "",
        "start_unix_ns": item.start_time,
        "end_unix_ns": item.end_time,
        "status": item.status.status_code.name,
        "attributes": dict(item.attributes or {}),
        "links": [f"{link.context.trace_id:032x}-{link.context.span_id:016x}" for link in item.links],
    }
    return json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"


__all__ = [
    "NO_SPAN",
    "TRACEPARENT_KEY",
    "TRACESTATE_KEY",
    "ClientSpan",
    "Span",
    "TraceContext",
    "Value",
    "configure",
    "current_trace",
    "current_trace_id",
    "current_traceparent",
    "enabled",
    "parse_traceparent",
    "recording",
    "sdk_context",
    "span",
    "span_below",
    "start_client_span",
    "start_server_span",
]
