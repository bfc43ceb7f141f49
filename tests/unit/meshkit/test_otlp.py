"""Logs and metrics by OTLP, read by a server that decodes what a collector would."""

from __future__ import annotations

import asyncio
import gzip
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from meshkit import otlp

ROOT = Path(__file__).parents[3]
CHILD = """
import structlog
from meshkit import tracing
from meshkit.context import run_id_var
from meshkit.settings import MeshSettings
from meshkit.telemetry import setup_logging

setup_logging(MeshSettings(replica="r-1"), "svc")
run_id_var.set("run-1")
tracing.start_server_span("/a/b", "00-" + "a" * 32 + "-" + "b" * 16 + "-01").enter()
structlog.get_logger("own").warning("careful", attempt=2, api_key="secret")
"""


@pytest.fixture
def collector() -> Iterator[tuple[str, dict[str, list[bytes]]]]:
    got: dict[str, list[bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            got.setdefault(self.path, []).append(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_line_goes_to_the_collector_and_to_stderr(collector: tuple[str, dict[str, list[bytes]]]) -> None:
    url, got = collector
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_LOGS_EXPORTER": "otlp",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert '"event":"careful"' in done.stderr
    [body] = got["/v1/logs"]
    [of_resource] = ExportLogsServiceRequest.FromString(body).resource_logs
    names = {one.key: one.value.string_value for one in of_resource.resource.attributes}
    assert (names["service.name"], names["service.instance.id"]) == ("hermesh-svc", "r-1")
    [record] = of_resource.scope_logs[0].log_records
    assert record.body.string_value == "careful"
    assert record.severity_text == "warning"
    assert record.trace_id.hex() == "a" * 32
    attributes = {one.key: one.value for one in record.attributes}
    assert attributes["run_id"].string_value == "run-1"
    assert attributes["attempt"].int_value == 2
    assert attributes["api_key"].string_value == "[redacted]"


async def test_figures_are_what_prometheus_would_read(
    collector: tuple[str, dict[str, list[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{url}/v1/metrics")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    registry = CollectorRegistry()
    Counter("asked", "Questions.", ["kind"], registry=registry).labels("odd").inc(3)
    Gauge("open", "Doors.", registry=registry).set(2)
    times = Histogram("took", "Seconds.", ["way"], buckets=(1, 5), registry=registry)
    for seconds in (0.5, 3, 7, 8):
        times.labels("long").observe(seconds)
    task = asyncio.get_running_loop().create_task(otlp.send_metrics("svc", "r-1", registry))
    async with asyncio.timeout(30):
        while "/v1/metrics" not in got:  # noqa: ASYNC110 - a thread of the server's fills it
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait({task})
    request = ExportMetricsServiceRequest.FromString(got["/v1/metrics"][0])
    found = {one.name: one for one in request.resource_metrics[0].scope_metrics[0].metrics}
    [point] = found["asked_total"].sum.data_points
    assert found["asked_total"].sum.is_monotonic
    assert (point.as_double, point.attributes[0].value.string_value) == (3, "odd")
    assert found["open"].gauge.data_points[0].as_double == 2
    [took] = found["took"].histogram.data_points
    assert (list(took.bucket_counts), list(took.explicit_bounds)) == ([1, 1, 2], [1, 5])
    assert (took.count, took.sum) == (4, 18.5)


async def test_nobody_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    assert not otlp.wanted("LOGS")
    await otlp.send_metrics("svc", "r-1")
