"""The trace and the log lines of a run, with a tool call and a takeover, as an operator looks them up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from bench.mesh import Mesh
from tests.e2e.client import Frame, http, new_session, run_stream, run_to_end, watch_to_end

TRACE = "0af7651916cd43dd8448eb211c8031"
CALLER = "b7ad6b7169203331"
TOOL = '[[tool=calculator {"expression":"6*7"}]]'


def spans(path: Path, trace_id: str) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        if trace_id in line:
            span = json.loads(line)
            if span["trace_id"] == trace_id:
                found.append(span)
    return found


async def until_ended(path: Path, trace_id: str, name: str, count: int) -> list[dict[str, Any]]:
    """The trace's spans once so many of a name have ended."""
    end = time.monotonic() + 30
    while len(named(found := spans(path, trace_id), name)) < count:
        assert time.monotonic() < end, [span["name"] for span in found]
        await asyncio.sleep(0.1)
    return found


async def whole(path: Path, trace_id: str) -> list[dict[str, Any]]:
    """The trace's spans once every parent is among them: a span is written when it ends, children before."""
    end = time.monotonic() + 30
    while True:
        found = spans(path, trace_id)
        known = {span["span_id"] for span in found} | {CALLER}
        missing = [span["name"] for span in found if span["parent_span_id"] not in known]
        if found and not missing:
            return found
        assert time.monotonic() < end, missing
        await asyncio.sleep(0.1)


def named(found: list[dict[str, Any]], name: str, kind: str = "") -> list[dict[str, Any]]:
    return [span for span in found if span["name"] == name and kind in ("", span["kind"])]


def lines(mesh: Mesh, run_id: str) -> list[dict[str, Any]]:
    """Every log line of a run, of all processes."""
    return [
        json.loads(line)
        for log in (mesh.data_dir / "logs").glob("*.log")
        for line in log.read_text(errors="replace").splitlines()
        if line.startswith("{") and run_id in line
    ]


def above(span: dict[str, Any], by_id: dict[str, dict[str, Any]]) -> list[str]:
    """The names of the spans that a span is below."""
    names = []
    while (parent := by_id.get(span["parent_span_id"])) is not None:
        names.append(parent["name"])
        span = parent
    return names


async def test_a_run_with_a_tool_call_is_one_trace(mesh: Mesh, trace_file: Path) -> None:
    trace_id = f"{TRACE}01"
    async with http(mesh) as client:
        session = await new_session(client)
        header = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
        async with run_stream(client, session, TOOL, headers=header) as stream:
            frames = [frame async for frame in stream]
    assert frames[-1].event == "run.completed"
    run_id = frames[0].run_id
    await until_ended(trace_file, trace_id, "POST /v1/sessions/{session_id}/runs", 1)
    found = await whole(trace_file, trace_id)
    by_id = {span["span_id"]: span for span in found}

    [request] = named(found, "POST /v1/sessions/{session_id}/runs")
    assert request["parent_span_id"] == CALLER
    assert request["attributes"]["http.response.status_code"] == 200
    [agent] = named(found, "invoke_agent")
    assert agent["attributes"]["hermesh.outcome"] == "completed"
    assert agent["links"] == []
    assert request["name"] in above(agent, by_id)
    first, second = sorted(named(found, "chat scripted"), key=lambda span: span["start_unix_ns"])
    for turn in (first, second):
        assert turn["parent_span_id"] == agent["span_id"]
        assert turn["attributes"]["gen_ai.provider.name"] == "openai"
        assert turn["attributes"]["gen_ai.usage.output_tokens"] >= 0
    assert first["attributes"]["gen_ai.response.finish_reasons"] == ["tool_calls"]
    assert second["attributes"]["gen_ai.response.finish_reasons"] == ["stop"]
    [call] = named(found, "execute_tool calculator")
    assert call["attributes"]["gen_ai.tool.call.id"] == f"{run_id}:1:0"
    assert call["parent_span_id"] == agent["span_id"]
    # The tool acts in another process, and the journal is asked before.
    [act] = named(found, "act calculator")
    assert act["service"] == "tool"
    assert call["name"] in above(act, by_id)
    [begin] = named(found, "hermesh.session.v1.SessionInternalService/BeginToolCall", "server")
    assert call["name"] in above(begin, by_id)
    # What the model asked for is committed before the tool acts, and the run's end at last.
    commits = sorted(named(found, "commit"), key=lambda span: span["start_unix_ns"])
    assert {span["service"] for span in commits} == {"session"}
    assert commits[0]["end_unix_ns"] <= act["start_unix_ns"]
    assert commits[-1]["attributes"]["hermesh.status"] == "COMPLETED"
    for span in (request, agent, first, second, call, begin, *commits):
        assert span["attributes"]["hermesh.run_id"] == run_id, span["name"]
    for span in (agent, first, call, *commits):
        assert span["attributes"]["hermesh.session_id"] == session, span["name"]
    tenants = {span["attributes"].get("hermesh.tenant_id") for span in (request, agent, first, call, begin)}
    assert len(tenants) == 1
    assert None not in tenants

    said = lines(mesh, run_id)
    assert {"gateway", "agent", "session", "tool"} <= {line["service"] for line in said}
    for line in said:
        assert line["run_id"] == run_id, line
    [ended] = [line for line in said if line["event"] == "request"]
    assert (ended["trace_id"], ended["tenant"]) == (trace_id, tenants.pop())
    # Whoever has a line of the run in hand finds its trace.
    assert {line["trace_id"] for line in said if line["service"] != "session"} == {trace_id}


async def test_a_takeover_stays_in_the_trace_and_links_to_the_attempt_before(
    mesh: Mesh, trace_file: Path
) -> None:
    trace_id = f"{TRACE}02"
    async with http(mesh) as client:
        session = await new_session(client)
        header = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
        frames: list[Frame] = []
        async with run_stream(client, session, "[[tokens=160 rate=20]]", headers=header) as stream:
            async for frame in stream:
                frames.append(frame)
                if frame.event == "text.delta":
                    break
        run_id = frames[0].run_id
        replica = next(frame.data["data"]["replica"] for frame in frames if frame.event == "run.started")
        # From its own word: asking the supervisor could take as long as the run does.
        ready = await asyncio.to_thread((mesh.data_dir / "ready" / f"{replica}.json").read_text)
        os.kill(json.loads(ready)["pid"], signal.SIGKILL)
        log = await watch_to_end(client, run_id)
    assert log[-1].event == "run.completed"
    [step] = [frame.data["data"] for frame in log if frame.event == "step.started"][:1]
    found = await until_ended(trace_file, trace_id, "invoke_agent", 1)
    # The first attempt's own span died with its agent; what it said of itself is in the log.
    [second] = named(found, "invoke_agent")
    assert second["attributes"]["hermesh.attempt"] == 2
    assert second["attributes"]["hermesh.outcome"] == "completed"
    assert second["links"] == ["-".join(step["traceparent"].split("-")[1:3])]
    assert any(span["parent_span_id"] == second["span_id"] for span in named(found, "chat scripted"))


async def test_health_checks_probes_and_renewals_are_in_no_trace(mesh: Mesh, trace_file: Path) -> None:
    async with http(mesh) as client:
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200
        await run_to_end(client, await new_session(client), "[[tokens=3]]")
    written = await asyncio.to_thread(trace_file.read_text)
    names = {json.loads(line)["name"] for line in written.splitlines()}
    assert any("SubmitRun" in name for name in names)
    for word in ("Health", "/ready", "RenewLeases", "Append", "ListLeases"):
        assert not any(word in name for name in names), word
