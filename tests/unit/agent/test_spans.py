"""A run's spans have the names that OpenTelemetry's conventions have now."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from opentelemetry.semconv._incubating.attributes import (
    db_attributes,
    error_attributes,
    http_attributes,
    rpc_attributes,
    url_attributes,
)
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai

from hermesh.session.v1.resources_pb2 import RunOptions
from meshkit import tracing
from services.agent.domain.loop import Call, CallModel, CallState, Turn
from services.agent.domain.prompt import RunSpec
from services.agent.model.port import Finished, TextDelta, Usage
from services.agent.runs import spans
from tests.unit.agent.fakes import FakeModel

ROOT = Path(__file__).resolve().parents[3]
SPEC = RunSpec("run-1", "session-1", "tenant-1", "small", temperature=0.5, seed=7, attempt=2)
FORMER = f"00-{'a' * 32}-{'b' * 16}-01"
ATTRIBUTE = re.compile(r'"((?:gen_ai|rpc|http|url|db|error)\.[a-z_.]+)"')
SOURCES = ("services/agent/runs/spans.py", "services/session/flusher.py", "services/tool/execution.py")


def known() -> set[str]:
    modules = (gen_ai, rpc_attributes, http_attributes, url_attributes, db_attributes, error_attributes)
    return {value for module in modules for value in vars(module).values() if isinstance(value, str)}


def test_every_attribute_is_one_of_the_conventions() -> None:
    used = set()
    for name in (*SOURCES, "meshkit/tracing.py", "gateway/edge.py"):
        used |= set(ATTRIBUTE.findall((ROOT / name).read_text()))
    assert "gen_ai.provider.name" in used
    # ASGI's own words.
    assert used - known() == {"http.response.start", "http.response.body"}


def test_an_attempt_has_its_turns_and_calls_below_it(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    end = tracing.configure("agent", "agent-1", path)
    try:
        with spans.run(SPEC, FORMER, "agent-1") as run:
            with spans.turn(SPEC, CallModel(3, "fresh")) as turn:
                spans.turn_ended(turn, Turn("text", (), "stop", Usage(5, 6, 4)), 0.25)
            call = Call("run-1:3:0", "search", "{}", CallState.UNKNOWN)
            with spans.tool(SPEC, call) as tool:
                spans.tool_ended(tool, call)
            spans.run_ended(run, "completed", Usage(5, 6, 4))
    finally:
        end()
    chat, search, agent = map(json.loads, path.read_text().splitlines())
    assert [one["name"] for one in (chat, search, agent)] == [
        "chat small",
        "execute_tool search",
        "invoke_agent",
    ]
    assert {one["parent_span_id"] for one in (chat, search)} == {agent["span_id"]}
    assert agent["links"] == ["a" * 32 + "-" + "b" * 16]
    assert chat["kind"] == "client"
    attributes = chat["attributes"]
    assert attributes["gen_ai.request.model"] == "small"
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.conversation.id"] == "session-1"
    assert attributes["gen_ai.response.time_to_first_chunk"] == 0.25
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 4
    assert (search["status"], search["attributes"]["error.type"]) == ("ERROR", "unknown")
    assert agent["status"] == "UNSET"
    for one in (chat, search, agent):
        assert one["attributes"]["hermesh.run_id"] == "run-1"
        assert one["attributes"]["hermesh.tenant_id"] == "tenant-1"


async def test_a_takeover_goes_on_in_the_trace_of_the_input_and_links_to_the_attempt_before(
    make_bench: Any, tmp_path: Path
) -> None:
    path = tmp_path / "spans.jsonl"
    end = tracing.configure("agent", "agent-1", path)
    try:
        bench = make_bench(
            FakeModel([[TextDelta("Hal")], asyncio.Event()], [[TextDelta("Hello")], [Finished("stop")]])
        )
        # As the store keeps it: nobody who dispatches the run knows of a trace.
        options = RunOptions(traceparent=FORMER)
        claim = bench.store.new_claim("hi", options)
        bench.supervisor.begin(claim)
        run = bench.store.runs[claim.run.run_id]
        await bench.store.until(lambda: "text.delta" in run.types())
        await bench.finish(bench.store.take_over(run.run_id, options))
    finally:
        end()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    attempts = {one["attributes"]["hermesh.attempt"]: one for one in written if one["name"] == "invoke_agent"}
    assert {one["trace_id"] for one in written} == {"a" * 32}
    assert {one["parent_span_id"] for one in attempts.values()} == {"b" * 16}
    assert attempts[1]["links"] == []
    assert attempts[2]["links"] == [f"{'a' * 32}-{attempts[1]['span_id']}"]
    assert (attempts[1]["status"], attempts[2]["status"]) == ("ERROR", "UNSET")
    # What is committed says below which attempt it hangs.
    assert run.data("step.started")[0]["traceparent"].split("-")[2] == attempts[1]["span_id"]


def test_what_was_said_is_in_no_span() -> None:
    source = (ROOT / "services/agent/runs/spans.py").read_text()
    for word in ("messages", "arguments", "content", "system_instructions"):
        assert f"gen_ai.{word}" not in source
        assert f".{word}" not in source
