"""Logs and metrics by OTLP over HTTP, beside stderr and Prometheus, for who collects everything that way.

Traces are `meshkit.tracing`'s. Each signal goes out only where somebody asked for it: by
`OTEL_EXPORTER_OTLP_LOGS_ENDPOINT` or `OTEL_LOGS_EXPORTER=otlp`, and the same with METRICS. No request waits:
lines go into a bounded queue that a thread of the SDK's sends, and figures are read and sent by a thread once
a minute. Without either the SDK is not imported.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import REGISTRY, CollectorRegistry

from meshkit import tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import Metric as SdkMetric
    from opentelemetry.sdk.resources import Resource

_log = structlog.get_logger("meshkit.otlp")

Event = MutableMapping[str, Any]

_SEVERITIES = {"debug": 5, "info": 9, "warning": 13, "error": 17, "critical": 21}
# Said by the line itself.
_NO_ATTRIBUTES = {"event", "timestamp", "level", "service", "replica", "trace_id"}
_TIMEOUT = 3
_INTERVAL_MS = 60_000
# What the exporter says of itself would go where it just failed to send.
_OWN = "opentelemetry"


def wanted(signal: str) -> bool:
    """Whether "LOGS" or "METRICS" are to go out."""
    if os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"):
        return True
    return os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() == "otlp"


def resource(service: str, replica: str) -> Resource:
    """What all signals of a process have in common."""
    from opentelemetry.sdk.resources import Resource

    return Resource.create({"service.name": f"hermesh-{service}", "service.instance.id": replica})


def log_processor(service: str, replica: str) -> Callable[[Any, str, Event], Event]:
    """Returns a structlog processor that hands each finished line to the exporter, too."""
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

    provider = LoggerProvider(resource=resource(service, replica))
    provider.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter(timeout=_TIMEOUT)))
    logger = provider.get_logger("hermesh")

    def emit(_: Any, __: str, event: Event) -> Event:
        if str(event.get("logger", "")).startswith(_OWN):
            return event
        from opentelemetry._logs import SeverityNumber

        level = str(event.get("level", "info"))
        attributes = {
            key: value if isinstance(value, str | int | float | bool) else str(value)
            for key, value in event.items()
            if key not in _NO_ATTRIBUTES and not key.startswith("_") and value is not None
        }
        logger.emit(
            timestamp=time.time_ns(),
            context=tracing.sdk_context(),
            severity_number=SeverityNumber(_SEVERITIES.get(level, 9)),
            severity_text=level,
            body=str(event.get("event", "")),
            attributes=attributes,
        )
        return event

    return emit


async def send_metrics(service: str, replica: str, registry: CollectorRegistry = REGISTRY) -> None:
    """Sends all figures of a process now and then, until cancelled; returns at once where nobody asked."""
    if not wanted("METRICS"):
        return
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import MetricExportResult

    exporter = OTLPMetricExporter(timeout=_TIMEOUT)
    about = resource(service, replica)
    began = time.time_ns()
    seconds = int(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL") or _INTERVAL_MS) / 1000

    def send() -> bool:
        return exporter.export(_data(about, metrics_of(registry, began))) is MetricExportResult.SUCCESS

    well = True
    while True:
        await asyncio.sleep(seconds)
        sent = await asyncio.to_thread(send)
        if sent != well:
            well = sent
            (_log.info if sent else _log.warning)(
                "metrics are sent again" if sent else "metrics are not sent"
            )


def _data(about: Resource, metrics: list[SdkMetric]) -> Any:
    from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    scope = ScopeMetrics(InstrumentationScope("hermesh"), metrics, "")
    return MetricsData([ResourceMetrics(about, [scope], "")])


def metrics_of(registry: CollectorRegistry, began: int) -> list[SdkMetric]:
    """Returns what Prometheus would read, in the SDK's form; `began` is when counting did, nanoseconds."""
    from opentelemetry.sdk.metrics import export as sdk

    now = time.time_ns()

    def point(sample: Any) -> sdk.NumberDataPoint:
        return sdk.NumberDataPoint(sample.labels, began, now, sample.value)

    found: list[SdkMetric] = []
    cumulative = sdk.AggregationTemporality.CUMULATIVE
    for family in registry.collect():
        samples = family.samples
        if family.type == "histogram":
            histogram = sdk.Histogram(list(_histogram_points(samples, began, now)), cumulative)
            found.append(sdk.Metric(family.name, family.documentation, "", histogram))
        elif family.type == "counter":
            points = [point(sample) for sample in samples if sample.name.endswith("_total")]
            found.append(
                sdk.Metric(
                    f"{family.name}_total", family.documentation, "", sdk.Sum(points, cumulative, True)
                )
            )
        else:
            gauge = sdk.Gauge([point(sample) for sample in samples])
            found.append(sdk.Metric(family.name, family.documentation, "", gauge))
    return [metric for metric in found if metric.data.data_points]


def _histogram_points(samples: Iterable[Any], began: int, now: int) -> Iterable[Any]:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    groups: dict[
        tuple[tuple[str, str], ...], tuple[dict[str, str], list[tuple[float, float]], dict[str, float]]
    ] = {}
    for sample in samples:
        labels = {key: value for key, value in sample.labels.items() if key != "le"}
        group = groups.setdefault(tuple(sorted(labels.items())), (labels, [], {}))
        if sample.name.endswith("_bucket"):
            group[1].append((float(sample.labels["le"]), sample.value))
        else:
            group[2][sample.name.rpartition("_")[2]] = sample.value
    for labels, buckets, totals in groups.values():
        buckets.sort()
        counts = [int(count) for _, count in buckets]
        yield HistogramDataPoint(
            attributes=labels,
            start_time_unix_nano=began,
            time_unix_nano=now,
            count=int(totals.get("count", 0)),
            sum=totals.get("sum", 0.0),
            bucket_counts=[count - before for before, count in zip([0, *counts], counts, strict=False)],
            explicit_bounds=[bound for bound, _ in buckets[:-1]],
            min=float("nan"),
            max=float("nan"),
        )
