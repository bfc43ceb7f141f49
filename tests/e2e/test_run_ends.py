"""How runs end when a model says what does not fit, and what becomes of input and arguments: a whole mesh."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.mesh import Mesh
from tests.e2e.client import assert_whole, http, new_session, run_to_end, submit, watch, watch_to_end
from tests.e2e.conftest import tracebacks

pytestmark = pytest.mark.timeout(240)

NO_MEMORY = {"options": {"memory": False}}
SLOW = "[[tokens=2000 rate=50]]"
INT32 = 2**31 - 1
TOOLS = """
import json
from pathlib import Path

from services.tool.registry import tool

LEDGER = Path({ledger!r})


@tool("keep", description="Keeps.", input_schema={{"type": "object"}}, requires_approval=True)
async def keep(arguments, context):
    with LEDGER.open("a") as ledger:
        ledger.write(json.dumps(arguments) + "\\n")
    return "kept"
"""
# No parser that makes a float of each number gives this back.
ODD = (
    '{"id": 18446744073709551616, "n":-12345678901234567890123, "x":0.1000000000000000055511151, "a":1,"a":2}'
)


@dataclass(frozen=True)
class Place:
    mesh: Mesh
    ledger: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("ends")
    ledger = folder / "ledger"
    (folder / "keeping_tools.py").write_text(TOOLS.format(ledger=str(ledger)))
    values = {"HERMESH_TOOL_MODULES": "keeping_tools", "PYTHONPATH": str(folder)}
    with Mesh(replicas="gateway=1,agent=1,session=1,tool=1,memory=1", settings=values) as mesh:
        yield Place(mesh, ledger)
        assert not tracebacks(mesh)


@pytest.mark.parametrize(
    ("counted", "stored"),
    [("99999999999", INT32), ("-1", 0), ("4.5", 4), ('"4.0"', 4), ("[4]", 0), ("1e300", INT32)],
)
async def test_a_reply_is_not_lost_to_what_its_server_counts(place: Place, counted: str, stored: int) -> None:
    async with http(place.mesh) as client:
        session = await new_session(client)
        frames = await run_to_end(client, session, f"[[tokens=3 counted={counted}]]", **NO_MEMORY)
        assert_whole(frames)
        assert frames[-1].event == "run.completed"
        run = (await client.get(f"/v1/runs/{frames[-1].run_id}")).json()
        assert (run["usage"]["output_tokens"], run["attempt"]) == (stored, 1)


async def test_interrupts_at_once_lose_no_input(place: Place) -> None:
    async with http(place.mesh) as client:
        session = await new_session(client)
        first = await submit(client, session, f"A {SLOW}", **NO_MEMORY)
        async with asyncio.timeout(20):
            await watch(client, first, 0, lambda frame: frame.event == "text.delta")
        texts = [f"{name} [[tokens=3]]" for name in "BCDE"]
        runs = await asyncio.gather(
            *(submit(client, session, text, concurrency="interrupt", **NO_MEMORY) for text in texts)
        )
        rows = (await client.get(f"/v1/sessions/{session}/runs")).json()["runs"]
        order = {row["run_id"]: row["ordinal"] for row in rows}
        last = max(runs, key=lambda run: order[run])
        async with asyncio.timeout(20):
            assert (await watch_to_end(client, last))[-1].event == "run.completed"
        messages = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
        said = [(m["run_id"], m["content"]) for m in messages if m["role"] == "user"]
        expected = sorted(zip(runs, texts, strict=True), key=lambda pair: order[pair[0]])
        assert said == [(first, f"A {SLOW}"), *expected]
        assert [m["ordinal"] for m in messages] == list(range(1, len(messages) + 1))


async def test_arguments_are_shown_run_and_kept_as_the_model_wrote_them(place: Place) -> None:
    async with http(place.mesh) as client:
        session = await new_session(client)
        run = await submit(client, session, f"[[tool=keep {ODD}]]", **NO_MEMORY)
        async with asyncio.timeout(20):
            await watch(client, run, 0, lambda frame: frame.event == "action.required")
        for path in ("/v1/actions", f"/v1/runs/{run}"):
            answer = await client.get(path)
            assert answer.status_code == 200, answer.text
            assert f'"arguments":{ODD}' in answer.text
        shown = await asyncio.to_thread(place.mesh.command, "actions")
        assert f"keep {ODD} needs approval" in shown
        decided = await client.post(f"/v1/runs/{run}/actions/{run}:1:0", json={"decision": "approve"})
        assert decided.status_code == 200, decided.text
        async with asyncio.timeout(20):
            frames = await watch_to_end(client, run)
        assert frames[-1].event == "run.completed"
        did = '{"id": 18446744073709551616, "n": -12345678901234567890123, "x": 0.1, "a": 2}'
        assert place.ledger.read_text().splitlines()[-1] == did
        messages = await client.get(f"/v1/sessions/{session}/messages")
        assert f'"arguments":{ODD}' in messages.text


@pytest.mark.parametrize("levels", [249, 250])
async def test_deeply_nested_arguments_are_run_or_told_to_the_model(place: Place, levels: int) -> None:
    nested = '{"a":' * levels + "1" + "}" * levels
    async with http(place.mesh) as client:
        session = await new_session(client)
        run = await submit(client, session, f"[[tool=keep {nested}]]", **NO_MEMORY)
        if levels == 249:
            async with asyncio.timeout(20):
                await watch(client, run, 0, lambda frame: frame.event == "action.required")
            assert nested in (await client.get("/v1/actions")).text
            body = {"decision": "deny"}
            decided = await client.post(f"/v1/runs/{run}/actions/{run}:1:0", json=body)
            assert decided.status_code == 200, decided.text
        async with asyncio.timeout(20):
            frames = await watch_to_end(client, run)
        assert frames[-1].event == "run.completed"
        [result] = [frame.data["data"] for frame in frames if frame.event == "tool.result"]
        assert result["status"] == "failed"
        assert ("nested deeper than 249" in result["content"]) == (levels == 250)
