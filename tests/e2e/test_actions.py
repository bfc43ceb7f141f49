"""Tool calls on a whole mesh whose agents and tool replicas are all killed in the middle of them, and what
waits for a person through a restart of everything. All runs go side by side; the ledger is the tools'
own side.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from playwright.async_api import async_playwright, expect
from prometheus_client.parser import text_string_to_metric_families

from bench.mesh import HERMESH, Mesh, wait_until
from tests.e2e.browser import LEFT_OUT, find_or_install
from tests.e2e.client import assert_whole, http, watch_to_end
from tests.e2e.conftest import tracebacks

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).resolve().parents[2]
# What each run asks the scripted model for.
ASKED = {
    "once": "[[tool=act_once {}]]",
    "page": '[[tool=act_once {"what":"page"}]]',
    "again": "[[tool=act_again {}]]",
    "known": "[[tool=act_known {}]]",
    "late": "[[tool=act_late {}]]",
    "approval": '[[tool=act_approved {"what":"a"}]] [[tool=act_approved {"what":"b"}]]'
    ' [[tool=calculator {"expression":"6*7"}]]',
}


@dataclass
class Broken:
    """A mesh after the kill.

    Attributes:
        runs: the runs by what they are about.
        sessions: their sessions.
    """

    mesh: Mesh
    ledger: Path
    runs: dict[str, str] = field(default_factory=dict)
    sessions: dict[str, str] = field(default_factory=dict)

    def lines(self, kind: str, about: str) -> list[str]:
        """What the ledger has of a run's calls."""
        text = self.ledger.read_text() if self.ledger.exists() else ""
        return [
            line for line in text.splitlines() if line.startswith(f"{kind} ") and self.runs[about] in line
        ]

    def get(self, path: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.mesh.url}{path}", headers=self.mesh.headers, timeout=30)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def status(self, about: str) -> str:
        try:
            return str(self.get(f"/v1/runs/{self.runs[about]}")["status"])
        except httpx.HTTPError:
            return "no gateway now"

    def submit(self, about: str) -> None:
        def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = httpx.post(f"{self.mesh.url}{path}", json=body, headers=self.mesh.headers, timeout=30)
            answer.raise_for_status()
            made: dict[str, Any] = answer.json()
            return made

        session = self.sessions[about] = str(post("/v1/sessions", {})["session_id"])
        self.runs[about] = str(post(f"/v1/sessions/{session}/runs", {"input": ASKED[about]})["run_id"])

    def resolve(self, about: str, call: str, decision: str, *more: str) -> str:
        return self.mesh.command("resolve", self.runs[about], call, decision, *more)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broken]:
    ledger = tmp_path_factory.mktemp("actions") / "ledger"
    settings = {
        "HERMESH_TOOL_MODULES": "tests.e2e.action_tools",
        "PYTHONPATH": str(ROOT),
        "ACTIONS_LEDGER": str(ledger),
    }
    with Mesh(replicas="agent=2,session=1,tool=2", settings=settings) as mesh:
        state = Broken(mesh, ledger)
        for about in ASKED:
            state.submit(about)
        begun = ("once", "page", "again", "known", "late")
        wait_until(lambda: all(state.lines("begin", about) for about in begun), 20, "calls that have begun")
        for row in mesh.status():
            if row.service in ("agent", "tool"):
                os.kill(row.pid, signal.SIGKILL)
        yield state
        found = tracebacks(mesh)
        assert not found, "the mesh logged what nobody expected:\n" + "\n".join(found)


def wait_for(broken: Broken, about: str, status: str, seconds: float = 60.0) -> None:
    wait_until(lambda: broken.status(about) == status, seconds, f"run {about!r} {status}")


async def log(broken: Broken, about: str) -> list[tuple[str, dict[str, Any]]]:
    """The whole log of a run that is finished: type and data of each event."""
    async with http(broken.mesh) as client:
        frames = await watch_to_end(client, broken.runs[about])
    assert_whole(frames)
    return [(frame.event, frame.data["data"]) for frame in frames]


def of(events: list[tuple[str, dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    return [data for event, data in events if event == kind]


async def idle(mesh: Mesh) -> bool:
    """Whether no agent works on a run and no tool on a call."""
    busy = 0.0
    async with httpx.AsyncClient(timeout=10) as client:
        for ready in (mesh.data_dir / "ready").glob("*.json"):
            facts = json.loads(ready.read_text())
            text = (await client.get(f"http://{facts['metrics_address']}/metrics")).text
            for family in text_string_to_metric_families(text):
                if family.name in ("hermes_active_sessions", "hermesh_tool_running"):
                    busy += sum(sample.value for sample in family.samples)
    return busy == 0


async def leases(mesh: Mesh) -> list[asyncpg.Record]:
    url = (await asyncio.to_thread(mesh.command, "env", "HERMESH_DATABASE_URL")).strip()
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return await connection.fetch(
            "SELECT r.run_id, l.owner, l.lease_until, r.status, r.dispatch_after"
            " FROM session.run r JOIN session.lease l USING (session_id)"
        )
    finally:
        await connection.close()


async def test_an_idempotent_call_finishes_by_itself_with_one_key(broken: Broken) -> None:
    await asyncio.to_thread(wait_for, broken, "again", "completed")
    acts = broken.lines("act", "again")
    assert len(acts) >= 2, "it was killed in the middle, and ran again"
    assert len({line.split()[3] for line in acts}) == 1
    events = await log(broken, "again")
    assert of(events, "tool.result")[-1]["content"] == "act_again done"
    assert not of(events, "action.required")


async def test_a_call_whose_tool_can_find_out_finishes_by_itself_and_ran_once(broken: Broken) -> None:
    await asyncio.to_thread(wait_for, broken, "known", "completed")
    assert len(broken.lines("act", "known")) == 1
    events = await log(broken, "known")
    assert [data["finding"] for data in of(events, "tool.reconciled")] == ["completed"]
    assert of(events, "tool.result")[-1]["content"] == "found in the ledger"
    assert not of(events, "action.required")


async def test_a_call_that_was_not_done_runs_again_when_nothing_can_act_any_more(broken: Broken) -> None:
    await asyncio.to_thread(wait_for, broken, "late", "completed")
    assert len(broken.lines("act", "late")) == 1
    assert len(broken.lines("begin", "late")) == 2
    assert len(broken.lines("look", "late")) >= 2, "the first look came too early to count"
    events = await log(broken, "late")
    assert [data["finding"] for data in of(events, "tool.reconciled")] == ["not_done"]
    assert of(events, "tool.result")[-1]["content"] == "act_late done"


async def test_what_waits_for_a_person_holds_nothing_and_survives_a_restart_of_everything(
    broken: Broken,
) -> None:
    mesh = broken.mesh
    waiting = ("once", "page", "approval")
    for about in waiting:
        await asyncio.to_thread(wait_for, broken, about, "requires_action")

    async def check() -> None:
        deadline = time.monotonic() + 20
        while not await idle(mesh):
            assert time.monotonic() < deadline, "something still works"
            await asyncio.sleep(0.1)
        rows = {str(row["run_id"]): row for row in await leases(mesh)}
        for about in waiting:
            row = rows[broken.runs[about]]
            assert (row["owner"], row["lease_until"], row["status"], row["dispatch_after"]) == (
                None,
                None,
                3,
                None,
            ), about
        for about in ("once", "page"):
            assert len(broken.lines("act", about)) == 1
        assert not broken.lines("act", "approval")

    await check()
    before = {row.pid for row in mesh.status() if row.pid}
    await asyncio.to_thread(mesh.command, "down")
    await asyncio.to_thread(mesh.command, "up", "--no-reply", "--replicas", mesh.replicas, seconds=120)
    assert not before & {row.pid for row in mesh.status()}
    await check()


async def test_what_waits_is_listed_with_the_commands_that_settle_it(broken: Broken) -> None:
    for about in ("once", "page", "approval"):
        await asyncio.to_thread(wait_for, broken, about, "requires_action")
    listed = broken.mesh.command("actions")
    for about, call, decision in (
        ("once", "1:0", "retry"),
        ("approval", "1:0", "approve"),
        ("approval", "1:1", "deny"),
    ):
        assert f"hermesh resolve {broken.runs[about]} {call} {decision}" in listed
    found = json.loads(broken.mesh.command("actions", "--json"))
    assert [(one["run_id"], one["kind"]) for one in found] == [
        (broken.runs["once"], "unknown"),
        (broken.runs["page"], "unknown"),
        (broken.runs["approval"], "approval"),
        (broken.runs["approval"], "approval"),
    ]
    # The calls of the same step that need no approval have run.
    async with http(broken.mesh) as client:
        text = (await client.get(f"/v1/runs/{broken.runs['approval']}")).json()
    assert [action["arguments"] for action in text["pending_actions"]] == [{"what": "a"}, {"what": "b"}]


async def test_one_command_settles_a_call_that_may_have_run(broken: Broken) -> None:
    await asyncio.to_thread(wait_for, broken, "once", "requires_action")
    said = await asyncio.to_thread(broken.resolve, "once", "1:0", "completed", "--content", "it was sent")
    assert said.startswith("completed; the run is ")
    await asyncio.to_thread(wait_for, broken, "once", "completed")
    events = await log(broken, "once")
    assert [data["kind"] for data in of(events, "action.required")] == ["unknown"]
    assert [data["decision"] for data in of(events, "action.resolved")] == ["completed"]
    assert of(events, "tool.result")[-1]["content"] == "it was sent"
    assert len(broken.lines("act", "once")) == 1


async def test_approvals_of_one_step_are_asked_at_once_and_decided_one_by_one(broken: Broken) -> None:
    await asyncio.to_thread(wait_for, broken, "approval", "requires_action")
    said = await asyncio.to_thread(broken.resolve, "approval", "1:1", "deny", "--content", "not b")
    assert said.startswith("deny; the run is requires_action")
    said = await asyncio.to_thread(broken.resolve, "approval", "1:0", "approve")
    assert not said.startswith("approve; the run is requires_action")
    await asyncio.to_thread(wait_for, broken, "approval", "completed")
    events = await log(broken, "approval")
    assert len(of(events, "action.required")) == 2
    assert [data["decision"] for data in of(events, "action.resolved")] == ["deny", "approve"]
    results = {data["call_id"].rpartition(":")[2]: data for data in of(events, "tool.result")}
    assert results["0"]["content"] == "act_approved done"
    assert (results["1"]["status"], results["1"]["content"]) == ("failed", "not b")
    assert "42" in results["2"]["content"]
    kinds = [kind for kind, _ in events]
    assert kinds.index("action.required") < kinds.index("tool.result") < kinds.index("action.resolved")
    assert len(broken.lines("act", "approval")) == 1


async def test_one_click_on_the_chat_page_settles_a_call_that_may_have_run(broken: Broken) -> None:
    await asyncio.to_thread(wait_for, broken, "page", "requires_action")
    browser = await asyncio.to_thread(find_or_install)
    if browser is None:
        pytest.skip(LEFT_OUT)
    mesh = broken.mesh
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(
            executable_path=browser.path, args=list(browser.flags), timeout=60_000
        )
        page = await chromium.new_page()
        page.set_default_timeout(30_000)
        await page.goto(f"{mesh.url}/#key={mesh.api_key}")
        await expect(page.locator("#chat")).to_be_visible(timeout=30_000)
        await page.evaluate(f"location.hash = '#/s/{broken.sessions['page']}'")
        await page.get_by_role("button", name="It was done").click()
        await expect(page.locator(".message.assistant .text").last).to_contain_text("The tool said")
        await chromium.close()
    await asyncio.to_thread(wait_for, broken, "page", "completed")
    assert len(broken.lines("act", "page")) == 1


async def test_a_run_in_the_terminal_says_which_command_settles_it(broken: Broken) -> None:
    process = await asyncio.create_subprocess_exec(
        str(HERMESH),
        "run",
        '[[tool=act_approved {"what":"c"}]]',
        env=broken.mesh.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    command = ""
    async with asyncio.timeout(60):
        while not (found := re.search(r"hermesh (resolve \S+ \S+ approve)", command)):
            command = (await process.stdout.readline()).decode()
        await asyncio.to_thread(broken.mesh.command, *found[1].split())
        rest = (await process.stdout.read()).decode()
        assert await process.wait() == 0
    assert "act_approved done" in rest
