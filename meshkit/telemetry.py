"""Logs and metrics of a process: structlog JSON lines on stderr, Prometheus figures."""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
import logging
import os
import reprlib
import sys
from collections.abc import Callable, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import orjson
import structlog
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from meshkit import otlp, tracing, variables
from meshkit.context import current_request_id, run_id_var
from meshkit.identity import current_identity
from meshkit.settings import MeshSettings
from meshkit.tracebacks import bounded, exception_text

_log = structlog.get_logger("meshkit.telemetry")

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

# Keys whose values are secrets wherever they turn up.
_SECRET_KEYS = frozenset(
    {"authorization", "api_key", "apikey", "token", "mesh_token", "password", "secret", "cookie"}
    | {"x-hermesh-mesh", "x_hermesh_mesh", "llm_api_key"}
)
_REDACTED = "[redacted]"

_MAX_VALUE = 2_000
_MAX_ITEMS = 40
_MAX_ITEM = 200
_NUMBERS = (int, float, type(None))
_COLLECTIONS = (dict, list, tuple, set, frozenset)
_repr = reprlib.Repr()
_repr.maxlevel = 4
_repr.maxdict = _repr.maxlist = _repr.maxtuple = _repr.maxset = _repr.maxfrozenset = 20
_repr.maxstring = _repr.maxother = _MAX_ITEM

Event = MutableMapping[str, Any]


class _Stderr:
    """Writes a finished line to stderr and never fails.

    A log that cannot be written (a full disk, a reader that is gone) must not fail the call it is about.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name

    def msg(self, line: bytes | str) -> None:
        data = line.encode("utf-8", "replace") if isinstance(line, str) else line
        try:
            os.write(2, data + b"\n")
        except OSError:
            return

    debug = info = warning = warn = error = critical = exception = fatal = log = msg


def _stderr(name: str = "", *_: Any) -> _Stderr:
    return _Stderr(name)


def _add_context(_: Any, __: str, event: Event) -> Event:
    if "request_id" not in event:
        request_id = current_request_id()
        if request_id:
            event["request_id"] = request_id
    if "trace_id" not in event:
        trace_id = tracing.current_trace_id()
        if trace_id:
            event["trace_id"] = trace_id
    if "run_id" not in event:
        run_id = run_id_var.get()
        if run_id:
            event["run_id"] = run_id
    if "tenant" not in event:
        tenant_id = current_identity().tenant_id
        if tenant_id is not None:
            event["tenant"] = str(tenant_id)
    return event


def redact(_: Any, __: str, event: Event) -> Event:
    """Replaces the values of secret keys; a structlog processor."""
    for key in event:
        if key.lower() in _SECRET_KEYS:
            event[key] = _REDACTED
    return event


def _add_exception(_: Any, __: str, event: Event) -> Event:
    """Replaces `exc_info` by its text; a structlog processor."""
    given = event.pop("exc_info", None)
    if given is True:
        given = sys.exc_info()
    error = given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        event["exception"] = exception_text(error)
    return event


def _bound(_: Any, __: str, event: Event) -> Event:
    """Bounds each value; a structlog processor. What a caller sent may be in any of them."""
    for key, value in event.items():
        if isinstance(value, str):
            if len(value) > _MAX_VALUE and key != "exception":
                event[key] = bounded(value, _MAX_VALUE)
        elif isinstance(value, _NUMBERS):
            if isinstance(value, int) and value.bit_length() > 64:
                event[key] = _text(value)
        elif isinstance(value, _COLLECTIONS):
            event[key] = _flat(value)
        elif not key.startswith("_"):
            event[key] = _text(value)
    return event


def _flat(value: Any) -> Any:
    """Returns a collection as it is if it is small and holds nothing but texts and numbers, else its text."""
    items = [*value, *value.values()] if isinstance(value, dict) else list(value)
    if len(items) <= _MAX_ITEMS and all(
        isinstance(item, _NUMBERS) or (isinstance(item, str) and len(item) <= _MAX_ITEM) for item in items
    ):
        return value
    return _text(value)


def _text(value: Any) -> str:
    # `repr` of what came from outside could be as long and as deep as that was.
    try:
        return bounded(_repr.repr(value) if isinstance(value, _COLLECTIONS) else str(value), _MAX_VALUE)
    except Exception:
        return f"[a {type(value).__name__}]"


def _printable(_: Any, __: str, event: Event) -> Event:
    """Escapes what a terminal would obey: nobody outside writes lines of ours; a structlog processor."""
    for key, value in event.items():
        if isinstance(value, str) and key != "exception" and not value.isprintable():
            event[key] = value.encode("unicode_escape").decode("ascii")
    return event


def _render_json(_: Any, __: str, event: Event) -> bytes:
    try:
        return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        # A lone surrogate, a huge integer, a cycle: a log line must come out all the same.
        return json.dumps({str(key): _text(value) for key, value in event.items()}).encode()


def setup_logging(settings: MeshSettings, service: str, replica: str | None = None) -> None:
    """Sends all logs of the process, those of libraries too, to stderr as one line each.

    Each line has timestamp (UTC), level, event, service, replica, and the request id, trace id, run and
    tenant of what is being served or worked on.
    """
    level = _LEVELS[settings.log_level]
    static = {"service": service, "replica": replica if replica is not None else settings.replica}

    def add_static(_: Any, __: str, event: Event) -> Event:
        event.update(static)
        return event

    shared: list[Callable[..., Any]] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_static,
        _add_context,
        redact,
        _add_exception,
        _bound,
    ]
    if otlp.wanted("LOGS"):
        shared.append(otlp.log_processor(service, static["replica"]))
    if settings.log_format == "json":
        render: list[Callable[..., Any]] = [_render_json]
        foreign: list[Callable[..., Any]] = [_decode_json]
    else:
        # An exception is text by now: the renderer's own way prints the variables of every frame.
        console = structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        )
        render = foreign = [_printable, console]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_stderr,
        cache_logger_on_first_use=True,
    )
    handler = _LibraryHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *foreign],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries tell what is wrong, not what they do.
    root.setLevel(max(level, logging.WARNING))
    for unknown in variables.unknown(os.environ):
        _log.warning("unknown setting", variable=unknown.name, nearest=unknown.nearest)


def _decode_json(logger: Any, name: str, event: Event) -> str:
    return _render_json(logger, name, event).decode()


class _LibraryHandler(logging.Handler):
    """Writes the standard library's log records the same way as ours."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:
            # Arguments that do not fit their text: a library's bug must not become its caller's.
            line = f"a log record of {record.name} cannot be shown: {type(error).__name__}"
        _Stderr().msg(line)


# The time at which each series began doubles the text of /metrics and is used by nobody here.
disable_created_metrics()  # type: ignore[no-untyped-call]


def begin_at_zero(counter: Counter, *values: str) -> Counter:
    """Gives a counter with one label its series before anything is counted; returns the counter.

    A series that begins with its first event shows Prometheus no increase, so that an alert would miss it.
    """
    for value in values:
        counter.labels(value)
    return counter


_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class RpcMetrics:
    """Figures of the RPCs that a process serves.

    Attributes:
        active: How many are being served, by any method.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Registers the metrics; once a registry (see `rpc_metrics`)."""
        self._started = Counter("hermesh_rpc_started", "RPCs begun.", ["method"], registry=registry)
        self._handled = Counter("hermesh_rpc_handled", "RPCs ended.", ["method", "code"], registry=registry)
        self._seconds = Histogram(
            "hermesh_rpc_seconds", "Time an RPC took.", ["method"], buckets=_BUCKETS, registry=registry
        )
        self.active = Gauge("hermesh_rpc_active", "RPCs being served now.", registry=registry)
        self._methods: dict[str, tuple[Counter, Histogram]] = {}
        self._codes: dict[tuple[str, str], Counter] = {}

    def started(self, method: str) -> None:
        """Counts a begun RPC."""
        children = self._methods.get(method)
        if children is None:
            children = (self._started.labels(method), self._seconds.labels(method))
            self._methods[method] = children
        children[0].inc()
        self.active.inc()

    def handled(self, method: str, code: str, seconds: float) -> None:
        """Counts an ended RPC."""
        child = self._codes.get((method, code))
        if child is None:
            child = self._codes[method, code] = self._handled.labels(method, code)
        child.inc()
        self._methods[method][1].observe(seconds)
        self.active.dec()


_rpc_metrics: WeakKeyDictionary[CollectorRegistry, RpcMetrics] = WeakKeyDictionary()


def rpc_metrics(registry: CollectorRegistry = REGISTRY) -> RpcMetrics:
    """Returns the RPC metrics of a registry, made at first use: a name can be registered only once."""
    metrics = _rpc_metrics.get(registry)
    if metrics is None:
        metrics = _rpc_metrics[registry] = RpcMetrics(registry)
    return metrics


_dependency_gauges: WeakKeyDictionary[CollectorRegistry, Gauge] = WeakKeyDictionary()


def dependency_gauge(registry: CollectorRegistry = REGISTRY) -> Gauge:
    """Returns the gauge of what a process depends on, made at first use as `rpc_metrics`."""
    gauge = _dependency_gauges.get(registry)
    if gauge is None:
        gauge = _dependency_gauges[registry] = Gauge(
            "hermesh_dependency_up",
            "1 while what the process depends on works, as this process sees it; 0 while it does not.",
            ["dependency"],
            registry=registry,
        )
    return gauge


_process_gauges: WeakKeyDictionary[CollectorRegistry, Gauge] = WeakKeyDictionary()


def tell_process(service: str, replica: str, registry: CollectorRegistry = REGISTRY) -> None:
    """Says which process this is: a constant 1 whose labels join to all of its other figures."""
    gauge = _process_gauges.get(registry)
    if gauge is None:
        gauge = _process_gauges[registry] = Gauge(
            "hermesh_process_info",
            "Always 1; which process this is.",
            ["service", "replica", "version"],
            registry=registry,
        )
    gauge.clear()
    gauge.labels(service, replica, _version()).set(1)


def _version() -> str:
    try:
        return importlib.metadata.version("hermesh")
    except importlib.metadata.PackageNotFoundError:
        return ""


_LAG_PERIOD = 1.0


class LoopMetrics:
    """Figures of a process's event loop and of what Python holds.

    Attributes:
        lag: How late the loop was; what blocks it shows here before it shows in anybody's latency.
        tasks: How many asyncio tasks are not done. At rest it is a constant of the process.
        blocks: How many blocks of memory Python's objects occupy: it tells a leak from memory that the
            allocator merely kept, which the resident size cannot.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Registers the metrics; once a registry."""
        self.lag = Gauge(
            "hermesh_loop_lag_seconds", "How late the event loop was a moment ago.", registry=registry
        )
        self.tasks = Gauge("hermesh_event_loop_tasks", "asyncio tasks that are not done.", registry=registry)
        self.blocks = Gauge(
            "hermesh_memory_blocks", "Blocks of memory that Python's objects occupy.", registry=registry
        )


async def watch_loop(metrics: LoopMetrics | None = None) -> None:
    """Measures the event loop each second; runs until it is cancelled."""
    if metrics is None:
        metrics = _loop_metrics()
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_PERIOD
        await asyncio.sleep(_LAG_PERIOD)
        metrics.lag.set(max(0.0, loop.time() - due))
        metrics.tasks.set(len(asyncio.all_tasks(loop)))
        metrics.blocks.set(sys.getallocatedblocks())


@functools.cache
def _loop_metrics() -> LoopMetrics:
    return LoopMetrics()


def render_metrics(registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """Returns the text of /metrics and its content type. Process metrics (process_*) are part of it."""
    return generate_latest(registry), CONTENT_TYPE_LATEST
