from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as pb_grpc
from meshkit import tracing
from meshkit.channel import open_channel
from meshkit.errors import InternalError, StartupError
from meshkit.settings import MeshSettings
from tests.unit.meshkit.support import Servicer, serve

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def _no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)


@pytest.fixture
def trace_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "spans.jsonl"
    end = tracing.configure("t", "t-1", path)
    yield path
    end()


def spans(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_traceparent_is_read_and_written() -> None:
    context = tracing.parse_traceparent(f"00-{TRACE}-{SPAN}-01")
    assert context == tracing.TraceContext(TRACE, SPAN, 1)
    assert context.traceparent == f"00-{TRACE}-{SPAN}-01"
    assert tracing.parse_traceparent(f"cc-{TRACE}-{SPAN}-01-later-versions") is not None


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "x",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
    ],
)
def test_a_broken_traceparent_begins_a_new_trace(text: str | None) -> None:
    assert tracing.parse_traceparent(text) is None
    span = tracing.start_server_span("/a/b", text)
    assert span.context.trace_id != TRACE
    assert tracing.parse_traceparent(span.traceparent) is not None


def test_without_an_exporter_the_trace_only_passes_through() -> None:
    server = tracing.start_server_span("/a/b", f"00-{TRACE}-{SPAN}-01", "vendor=1")
    assert not server.recording
    server.enter()
    try:
        assert tracing.current_trace_id() == TRACE
        client = tracing.start_client_span("/c/d")
        assert client.context.trace_id == TRACE
        assert client.context.span_id not in (SPAN, server.context.span_id)
        assert client.context.state == "vendor=1"
        assert client.traceparent.endswith("-01")
        assert tracing.current_traceparent() == server.traceparent
    finally:
        server.leave()
        server.end()
    assert tracing.current_trace_id() == ""


def test_no_exporter_means_no_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    end = tracing.configure("t", "t-1")
    assert tracing._State.tracer is None
    end()


def test_spans_are_written_with_their_parents(trace_file: Path) -> None:
    with tracing.span("outer", {"model": "m"}) as outer:
        assert outer.recording
        with pytest.raises(KeyError), tracing.span("inner"):
            raise KeyError("x")
    inner_line, outer_line = spans(trace_file)
    assert (outer_line["name"], outer_line["parent_span_id"]) == ("outer", "")
    assert outer_line["attributes"]["model"] == "m"
    assert inner_line["parent_span_id"] == outer_line["span_id"]
    assert inner_line["trace_id"] == outer_line["trace_id"]
    assert (inner_line["status"], inner_line["service"], inner_line["replica"]) == ("ERROR", "t", "t-1")
    assert inner_line["end_unix_ns"] >= inner_line["start_unix_ns"]


def test_an_unsampled_trace_is_not_recorded(trace_file: Path) -> None:
    span = tracing.start_server_span("/a/b", f"00-{TRACE}-{SPAN}-00")
    assert not span.recording
    assert span.context.trace_id == TRACE
    span.end()
    assert spans(trace_file) == []


async def test_one_trace_joins_client_and_server(
    settings: MeshSettings, servicer: Servicer, tmp_path: Path
) -> None:
    path = tmp_path / "spans.jsonl"

    async def unary(request: Any, context: Any) -> Any:
        if request.api_key == "outer":
            await stub.Authenticate(pb.AuthenticateRequest(api_key="inner"))
            return pb.AuthenticateResponse()
        raise InternalError()

    servicer.unary = unary
    async with serve(settings.model_copy(update={"trace_file": path}), servicer) as server:
        async with open_channel(settings, server.address) as channel:
            stub = pb_grpc.SessionInternalServiceStub(channel)
            with tracing.span("root"), pytest.raises(Exception, match="internal error"):
                await stub.Authenticate(pb.AuthenticateRequest(api_key="outer"))
    written = spans(path)
    root = next(span for span in written if span["name"] == "root")
    by_id = {span["span_id"]: span for span in written}
    assert len(written) == 5
    assert {span["trace_id"] for span in written} == {root["trace_id"]}
    chains = []
    for span in written:
        chain = [span["kind"]]
        while span["parent_span_id"]:
            span = by_id[span["parent_span_id"]]
            chain.append(span["kind"])
        chains.append(tuple(reversed(chain)))
    assert ("internal", "client", "server", "client", "server") in chains
    codes = [span["attributes"].get("rpc.response.status_code") for span in written]
    assert codes.count("INTERNAL") == 4
    [inner] = {span["attributes"].get("rpc.method") for span in written} - {None}
    assert inner == "hermesh.session.v1.SessionInternalService/Authenticate"
    assert tracing._State.tracer is None


def test_what_nobody_asked_for_belongs_to_no_trace(trace_file: Path) -> None:
    call = tracing.start_client_span("/a/Renew")
    health = tracing.start_server_span("/grpc.health.v1.Health/Check", None, recorded=False)
    for span in (call, health):
        assert not span.recording
        # Nor do others record what comes of it.
        assert span.traceparent.endswith("-00")
        span.enter()
        assert not tracing.recording()
        assert not tracing.start_client_span("/a/Next").recording
        span.leave()
        span.end()
    assert spans(trace_file) == []


def test_a_span_may_hang_below_another_processes_and_link_to_a_third(trace_file: Path) -> None:
    parent, link = f"00-{TRACE}-{SPAN}-01", tracing.TraceContext("1" * 32, "2" * 16, 1)
    with tracing.span_below(parent, "commit", {"events": 3}, kind="client"):
        with tracing.span("inner", links=[link]):
            assert tracing.recording()
    with tracing.span_below("", "nothing"), tracing.span_below("nonsense", "nothing"):
        assert not tracing.recording()
    inner, outer = spans(trace_file)
    assert (outer["trace_id"], outer["parent_span_id"], outer["kind"]) == (TRACE, SPAN, "client")
    assert inner["links"] == [f"{link.trace_id}-{link.span_id}"]


def test_a_part_of_the_traces_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_TRACES_SAMPLER", raising=False)
    path = tmp_path / "spans.jsonl"
    end = tracing.configure("t", "t-1", path, 0.0)
    try:
        with tracing.span("root") as root, tracing.span("inner"):
            assert not root.recording
            assert not tracing.recording()
        # Whoever asks for it gets it.
        asked = tracing.start_server_span("/a/b", f"00-{TRACE}-{SPAN}-01")
        assert asked.recording
        asked.end_rpc("OK")
    finally:
        end()
    assert [span["name"] for span in spans(path)] == ["a/b"]


def test_without_an_exporter_a_span_of_ones_own_is_nothing() -> None:
    with tracing.span("work", {"a": 1}) as span:
        span.set("b", 2)
        span.fail("bad")
        span.rename("other")
        assert tracing.current_trace() is None
    assert span is tracing.NO_SPAN
    assert not tracing.enabled()


def test_a_trace_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="HERMESH_TRACE_FILE"):
        tracing.configure("t", "t-1", tmp_path / "file" / "spans.jsonl")
    assert tracing._State.tracer is None
