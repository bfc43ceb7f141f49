"""What the chat page shows after a reload, in another tab and of long ago: the same as was shown live.

The mesh is fake; see tests/e2e/chat_page.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import BrowserContext, Page, expect

from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import session_service_pb2 as session_pb
from tests.e2e.chat_page import COMPLETED, Served, Steps, chromium, context, page, send, served
from tests.fakes.mesh import API_KEY, FakeRun, FakeSession

__all__ = ["chromium", "context", "page", "served"]

pytestmark = pytest.mark.asyncio(loop_scope="module")

BIG = 2**64 + 1
# What is drawn, but for what a person opened.
DRAWN = "document.querySelector('#log').innerHTML.replaceAll(' open=\"\"', '')"


async def eventful(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """A run with something of everything."""
    calls = [f"{run.run_id}:1:{index}" for index in range(5)]
    yield "run.started", {"attempt": 1, "replica": "agent-1"}
    yield "memory.recalled", {"memories": [{"memory_id": "m", "text": "Ada likes sums", "score": 0.9}]}
    yield "context.degraded", {"part": "preferences", "detail": "too slow"}
    yield "step.started", {"step": 1}
    yield "reasoning.delta", {"text": "She wants *all* of it."}
    yield "text.delta", {"text": "I will try "}
    yield "text.delta", {"text": "five things."}
    for index, call_id in enumerate(calls):
        arguments = {"n": BIG, "index": index}
        yield (
            "tool.call",
            {"call_id": call_id, "name": f"tool_{index}", "arguments": arguments, "effect": "pure"},
        )
    yield (
        "tool.result",
        {"call_id": calls[0], "status": "completed", "content": '{"sum": 18446744073709551617}'},
    )
    yield "tool.result", {"call_id": calls[1], "status": "failed", "content": "no such file"}
    asked = {"kind": "approval", "arguments": {"n": BIG}}
    yield "action.required", {"call_id": calls[2], "name": "tool_2", **asked}
    yield "action.required", {"call_id": calls[3], "name": "tool_3", **asked}
    yield "action.resolved", {"call_id": calls[2], "decision": "deny", "content": "Not on a Friday."}
    yield "action.resolved", {"call_id": calls[3], "decision": "approve", "content": ""}
    yield "tool.result", {"call_id": calls[2], "status": "failed", "content": "Not on a Friday."}
    yield "tool.result", {"call_id": calls[3], "status": "completed", "content": "sent"}
    yield "tool.result", {"call_id": calls[4], "status": "unknown", "content": ""}
    yield "step.started", {"step": 2}
    yield "text.delta", {"text": "lost half"}
    yield "attempt.reset", {"from_seq": 23, "reason": "takeover"}
    yield "step.started", {"step": 2}
    yield "text.delta", {"text": "Two of them **worked**."}
    content = {"message_id": "m", "role": "assistant", "content": "Two of them **worked**.", "tool_calls": []}
    yield "message.completed", content
    yield "usage", {"input_tokens": 42, "output_tokens": 8, "cached_tokens": 1, "ttft_ms": 84}
    yield COMPLETED


async def test_a_reload_shows_exactly_what_was_shown_live(page: Page, served: Served) -> None:
    served.mesh.script = eventful
    await send(page, "do all of it")
    await expect(page.locator(".usage")).to_have_text("42 tokens read · 8 written · first one after 84 ms")
    states = page.locator(".tool summary")
    said = [
        "tool_0 completed",
        "tool_1 failed",
        "tool_2 denied, it did not run",
        "tool_3 completed",
        "tool_4 unknown: it may have taken effect",
    ]
    await expect(states).to_have_text(said)
    await expect(page.locator(".decided").first).to_contain_text("tool_2: denied, by a person on ")
    await expect(page.locator(".decided").first).to_contain_text("Not on a Friday.")
    await expect(page.locator(".decided").last).to_contain_text("tool_3: approved, by a person on ")
    await expect(page.locator(".reasoning .text")).to_have_text("She wants all of it.")
    live = await page.evaluate(DRAWN)
    assert "lost half" not in live
    # Neither a person nor the page rounds what a model wrote.
    assert live.count(str(BIG)) == 6
    await page.reload()
    await expect(states).to_have_text(said)
    assert await page.evaluate(DRAWN) == live


async def test_a_failed_run_is_the_same_after_a_reload(page: Page, served: Served) -> None:
    async def fails(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        yield "run.started", {"attempt": 1, "replica": "agent-1"}
        yield "text.delta", {"text": "Half a"}
        yield "run.failed", {"code": "UNAVAILABLE", "reason": "X", "message": "no model", "retryable": True}

    served.mesh.script = fails
    await send(page, "try")
    await expect(page.locator(".notice.bad")).to_contain_text("no model")
    live = await page.evaluate(DRAWN)
    await page.reload()
    await expect(page.locator(".notice.bad")).to_contain_text("no model")
    assert await page.evaluate(DRAWN) == live
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".message.user")).to_have_text(["try", "try"])


async def test_input_that_waits_is_shown_also_after_a_reload_and_has_its_turn(
    page: Page, served: Served
) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    served.mesh.one_at_a_time = True
    await send(page, "first")
    steps.text("one ")
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
    await send(page, "second")
    await send(page, "third")
    waits = page.locator(".waits")
    for _ in range(2):
        await expect(page.locator(".message.user")).to_have_text(["first", "second", "third"])
        await expect(waits).to_have_text(["Waits for its turn. Cancel it"] * 2)
        await page.reload()
    await expect(page.locator(".message.user")).to_have_text(["first", "second", "third"])
    steps.end()
    steps.text("two")
    await expect(page.locator(".message.assistant .text")).to_have_text(["one", "two"])
    await expect(waits).to_have_count(1)
    steps.end()
    steps.text("three")
    steps.end()
    await expect(page.locator(".message.assistant .text")).to_have_text(["one", "two", "three"])
    await expect(page.locator("#stop")).to_be_hidden()


@pytest.mark.parametrize("how", ["its own button", "stop"])
async def test_input_that_is_stopped_while_it_waits_is_kept(page: Page, served: Served, how: str) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    served.mesh.one_at_a_time = True
    await send(page, "first")
    steps.text("one ")
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
    await send(page, "second")
    await expect(page.locator(".waits")).to_contain_text("Waits for its turn")
    if how == "stop":
        await page.click("#stop")
        await expect(page.locator("#stop")).to_be_hidden()
    else:
        await page.get_by_role("button", name="Cancel it").click()
    for _ in range(2):
        await expect(page.locator(".note .notice")).to_contain_text(
            "Stopped before its turn: it got no reply."
        )
        await expect(page.locator(".message.user")).to_have_text(["first", "second"])
        await expect(page.locator(".waits")).to_have_count(0)
        await page.reload()
    await page.get_by_role("button", name="Edit and send again").click()
    await expect(page.locator("#input")).to_have_value("second")
    if how != "stop":
        # The one at work went on.
        steps.text("still")
        await expect(page.locator(".message.assistant .text")).to_have_text("one still")
        steps.end()


async def test_another_tab_sees_what_this_one_does(
    page: Page, context: BrowserContext, served: Served
) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    served.mesh.one_at_a_time = True
    await send(page, "first")
    steps.text("one")
    steps.end()
    # Its text first: before the run has begun there is no button either, and no session in the address.
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
    await expect(page.locator("#stop")).to_be_hidden()
    other = await context.new_page()
    await other.goto(page.url)
    await expect(other.locator(".message.assistant .text")).to_have_text("one")
    await send(page, "second")
    steps.text("two ")
    await expect(other.locator(".message.user")).to_have_text(["first", "second"])
    await expect(other.locator(".message.assistant .text")).to_have_text(["one", "two"])
    await expect(other.locator("#stop")).to_be_visible()
    # And the other way round: one waits for its turn, in both.
    await send(other, "third")
    await expect(page.locator(".waits")).to_contain_text("Waits for its turn")
    await expect(page.locator(".message.user")).to_have_text(["first", "second", "third"])
    await other.click("#stop")
    await expect(page.locator(".message.assistant .notice")).to_have_text("Stopped.")
    await expect(page.locator(".note .notice")).to_contain_text("Stopped before its turn")
    assert len(served.mesh.runs) == 3
    await page.bring_to_front()
    await other.click("#delete-button")
    await other.get_by_role("button", name="Delete", exact=True).last.click()
    await expect(page.locator("#sessions a")).to_have_count(0)


async def test_a_tab_that_nobody_looks_at_holds_no_connection_and_catches_up(
    page: Page, served: Served
) -> None:
    """Six connections are all that a browser has for a host."""
    hide = """(state) => {
      Object.defineProperty(document, "visibilityState", { configurable: true, get: () => state });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    await send(page, "one")
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
    session = next(iter(served.mesh.sessions.values()))

    async def watching(count: int) -> None:
        async with asyncio.timeout(10):
            while served.gateway.hub.open != count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    await watching(1)
    await page.evaluate(hide, "hidden")
    await watching(0)
    message = InputMessage(role="user", content="two ")
    request = session_pb.SubmitRunRequest(session_id=session.session_id, input=[message])
    await served.mesh.submit(request, session.tenant)
    await page.evaluate(hide, "visible")
    await expect(page.locator(".message.assistant .text")).to_have_text(["one", "two"])
    await watching(1)


async def test_messages_that_are_sent_fast_stay_in_order_and_in_one_conversation(
    page: Page, served: Served
) -> None:
    served.mesh.one_at_a_time = True
    words = [f"word-{number}" for number in range(8)]
    await page.fill("#input", "")
    for word in words:
        await send(page, word)
    await expect(page.locator(".message.assistant .text")).to_have_text(words)
    await expect(page.locator(".message.user")).to_have_text(words)
    assert len(served.mesh.sessions) == 1
    assert [run.input[0][1] for run in served.mesh.runs.values()] == words


async def test_a_rename_is_of_the_conversation_in_which_it_began(page: Page, served: Served) -> None:
    await send(page, "first one")
    await expect(page.locator("#sessions a")).to_have_text(["first one"])
    await page.keyboard.press("Alt+n")
    await send(page, "second one")
    await expect(page.locator("#sessions a")).to_have_text(["second one", "first one"])
    await page.click("#rename-button")
    await page.fill("#rename", "The second")
    await page.click("#sessions a >> text=first one")
    await expect(page.locator(".message.user")).to_have_text("first one")
    # It was not saved, and is not the other one's.
    await expect(page.locator("#rename-form")).to_be_hidden()
    assert [session.title for session in served.mesh.sessions.values()] == ["first one", "second one"]
    await page.click("#rename-button")
    await expect(page.locator("#rename")).to_have_value("first one")
    # Saved in the very moment in which another one is opened.
    await page.evaluate(
        """() => {
          document.querySelector("#rename").value = "The first";
          document.querySelector("#rename-form").requestSubmit();
          const links = [...document.querySelectorAll("#sessions a")];
          links.find((one) => one.textContent === "second one").click();
        }"""
    )
    await expect(page.locator("#sessions a >> text=The first")).to_be_visible()
    await expect(page.locator(".message.user")).to_have_text("second one")
    await expect(page.locator("#title")).to_have_text("second one")
    assert [session.title for session in served.mesh.sessions.values()] == ["The first", "second one"]


async def with_runs(served: Served, count: int) -> FakeSession:
    """A conversation of so many finished runs."""
    session = served.mesh.add_session("Long")
    for number in range(1, count + 1):
        message = InputMessage(role="user", content=f"q{number} ")
        request = session_pb.SubmitRunRequest(session_id=session.session_id, input=[message])
        run = await served.mesh.submit(request, session.tenant)
        await run.log.wait_beyond(1 << 30)
    return session


async def test_a_long_conversation_is_read_page_by_page(page: Page, served: Served) -> None:
    session = await with_runs(served, 45)
    questions = [f"q{number} " for number in range(1, 46)]
    await page.goto(f"{served.url}/#/s/{session.session_id}")
    users = page.locator(".message.user .body")
    await expect(users).to_have_text([text.strip() for text in questions[25:]])
    await expect(page.locator(".message.assistant .text")).to_have_count(20)
    earlier = page.get_by_role("button", name="Earlier messages")
    # What is read stays where it is.
    await page.evaluate("document.querySelector('#log').scrollTop = 0")
    top = users.first
    before = await top.bounding_box()
    await earlier.click()
    await expect(users).to_have_text([text.strip() for text in questions[5:]])
    after = await page.locator(".message.user .body >> text=q26").bounding_box()
    assert before is not None
    assert after is not None
    assert abs(before["y"] - after["y"]) < 60
    await earlier.click()
    await expect(users).to_have_text([text.strip() for text in questions])
    await expect(page.locator(".message.assistant .text")).to_have_count(45)
    await expect(earlier).to_have_count(0)
    # It goes on at the end.
    await send(page, "q46")
    await expect(page.locator(".message.assistant .text").last).to_have_text("q46")


@pytest.mark.parametrize("expired", [2, 25, 30])
async def test_what_is_older_than_the_log_is_shown_from_its_messages(
    page: Page, served: Served, expired: int
) -> None:
    session = await with_runs(served, 30)
    served.mesh.expired = {run.run_id for run in session.runs[:expired]}
    served.mesh.messages_a_page = 7
    await page.goto(f"{served.url}/#/s/{session.session_id}")
    questions = [f"q{number}" for number in range(1, 31)]
    users = page.locator(".message.user .body")
    await expect(users).to_have_text(questions[10:])
    await expect(page.locator(".message.assistant .text")).to_have_text(questions[10:])
    await page.get_by_role("button", name="Earlier messages").click()
    await expect(users).to_have_text(questions)
    await expect(page.locator(".message.assistant .text")).to_have_text(questions)
    older = page.locator(".message.assistant .notice", has_text="only the messages are left")
    await expect(older).to_have_count(expired)
    await expect(page.locator("#status")).to_have_text("")
    await send(page, "q31")
    await expect(page.locator(".message.assistant .text").last).to_have_text("q31")


async def test_notices_stay_in_the_column(page: Page, served: Served) -> None:
    served.mesh.script = eventful
    await send(page, "do all of it " * 30)
    await expect(page.locator(".usage")).to_be_visible()
    await page.reload()
    await expect(page.locator(".usage")).to_be_visible()
    # Once it is laid out: what was just drawn may still find its place.
    await page.wait_for_function(
        """() => {
          const column = document.querySelector(".run").getBoundingClientRect();
          const parts = ".notice, .details, .text, .usage, .body";
          return [...document.querySelector("#log").querySelectorAll(parts)]
            .map((one) => one.getBoundingClientRect())
            .every((box) => box.left >= column.left - 1 && box.right <= column.right + 1);
        }""",
        timeout=5_000,
    )
    column = await page.locator(".run").bounding_box()
    log = await page.locator("#log").bounding_box()
    assert column is not None
    assert log is not None
    assert column["width"] < 760 < log["width"]
    assert abs((column["x"] - log["x"]) - (log["x"] + log["width"] - column["x"] - column["width"])) < 40


async def test_a_conversation_that_cannot_be_read_can_be_tried_again(page: Page, served: Served) -> None:
    await send(page, "one")
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
    url = page.url
    await page.goto("about:blank")
    await page.route("**/v1/sessions/*/runs?*", lambda route: route.fulfill(status=400, body="{}"))
    await page.goto(f"{served.url}/#key={API_KEY}")
    await expect(page.locator("#chat")).to_be_visible()
    await page.goto(url)
    await expect(page.locator("#status")).to_contain_text("cannot be loaded")
    await page.unroute("**/v1/sessions/*/runs?*")
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
