"""The chat page in a real Chromium, on chat_page.py's fake mesh; a whole one: test_chat_page_on_mesh.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from playwright.async_api import BrowserContext, Page, Route, expect

from hermesh.session.v1 import resources_pb2 as resources
from meshkit.errors import FailedPreconditionError
from tests.e2e.chat_page import (
    COMPLETED,
    Served,
    Steps,
    chromium,
    context,
    page,
    send,
    served,
)
from tests.fakes.mesh import API_KEY, FakeRun

__all__ = ["chromium", "context", "page", "served"]

# One browser for all tests, and so one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_link_with_the_key_signs_in_and_leaves_no_trace_of_it(page: Page, served: Served) -> None:
    assert API_KEY not in page.url
    assert "key=" not in page.url
    cookies = await page.context.cookies()
    assert [(c["name"], c["httpOnly"], c["sameSite"]) for c in cookies] == [("hermesh_login", True, "Strict")]
    assert API_KEY not in json.dumps(cookies)
    assert await page.evaluate("document.cookie") == ""
    assert API_KEY not in await page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")


async def test_a_pasted_key_signs_in_and_a_wrong_one_is_told(context: BrowserContext, served: Served) -> None:
    page = await context.new_page()
    await page.goto(served.url)
    await page.fill("#api-key", "hm_wrong")
    await page.click("#signin-form button")
    await expect(page.locator("#signin-error")).to_contain_text("not valid")
    await page.fill("#api-key", API_KEY)
    await page.keyboard.press("Enter")
    await expect(page.locator("#chat")).to_be_visible()
    await page.reload()
    await expect(page.locator("#chat")).to_be_visible()
    await page.click("#signout")
    await expect(page.locator("#signin")).to_be_visible()
    await page.reload()
    await expect(page.locator("#signin")).to_be_visible()


async def test_a_reply_streams_in_as_it_is_written(page: Page, served: Served) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    await send(page, "hello")
    await expect(page.locator(".message.user")).to_have_text("hello")
    steps.text("First ", "words")
    text = page.locator(".message.assistant .text")
    await expect(text).to_have_text("First words")
    await expect(page.locator("#stop")).to_be_visible()
    await expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "true")
    steps.text(" and last.")
    steps.end()
    await expect(text).to_have_text("First words and last.")
    await expect(page.locator("#stop")).to_be_hidden()
    await expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "false")
    await expect(page.locator("#sessions a[aria-current]")).to_have_text("hello")


async def test_a_reload_in_the_middle_of_a_reply_goes_on(page: Page, served: Served) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    await send(page, "count")
    steps.text("one ", "two ")
    await expect(page.locator(".message.assistant .text")).to_have_text("one two")
    await page.reload()
    await expect(page.locator(".message.user")).to_have_text("count")
    await expect(page.locator(".message.assistant .text")).to_have_text("one two")
    steps.text("three")
    await expect(page.locator(".message.assistant .text")).to_have_text("one two three")
    steps.say("message.completed", message_id="m", role="assistant", content="one two three", tool_calls=[])
    steps.end()
    await expect(page.locator("#stop")).to_be_hidden()
    await page.reload()
    await expect(page.locator(".message.assistant .text")).to_have_text("one two three")
    assert len(served.mesh.runs) == 1


async def test_a_gateway_that_restarts_is_hardly_noticed(page: Page, served: Served) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    await send(page, "count")
    steps.text("one ")
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
    await served.restart()
    steps.text("two ", "three")
    steps.end()
    await expect(page.locator(".message.assistant .text")).to_have_text("one two three")
    await expect(page.locator("#status")).to_have_text("")
    assert len(served.mesh.runs) == 1


async def test_an_agent_that_dies_is_not_noticed(page: Page, served: Served) -> None:
    served.mesh.watch_cuts = [(3, grpc.StatusCode.UNAVAILABLE)]
    await send(page, "a b c d")
    await expect(page.locator(".message.assistant .text")).to_have_text("a b c d")


async def test_text_of_a_lost_attempt_is_taken_back(page: Page, served: Served) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    await send(page, "count")
    steps.say("step.started", step=1)
    steps.text("half a sen")
    await expect(page.locator(".message.assistant .text")).to_have_text("half a sen")
    steps.say("attempt.reset", from_seq=2, reason="takeover")
    steps.say("step.started", step=1)
    steps.text("A whole sentence.")
    steps.end()
    await expect(page.locator(".message.assistant")).to_have_text("A whole sentence.")


async def test_the_stop_button_cancels(page: Page, served: Served) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    await send(page, "count")
    steps.text("one ")
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
    await page.click("#stop")
    await expect(page.locator(".message.assistant .notice")).to_have_text("Stopped.")
    await expect(page.locator("#stop")).to_be_hidden()


async def test_tools_and_memories_are_shown(page: Page, served: Served) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    await send(page, "calculate")
    steps.say("memory.recalled", memories=[{"memory_id": "m", "text": "Ada likes sums", "score": 0.9}])
    steps.say("context.degraded", part="preferences", detail="too slow")
    steps.say("tool.call", call_id="c", name="calculator", arguments={"expression": "2+2"}, effect="pure")
    steps.say("tool.progress", call_id="c", text="working on it")
    await expect(page.locator(".tool summary")).to_have_text("calculator working")
    steps.say("tool.result", call_id="c", status="completed", content="4")
    await expect(page.locator(".tool summary")).to_have_text("calculator completed")
    await page.click(".tool summary")
    await expect(page.locator(".tool pre").first).to_contain_text('"expression": "2+2"')
    await expect(page.locator(".tool pre").last).to_have_text("4")
    await page.click(".memories summary")
    await expect(page.locator(".memories li")).to_have_text("Ada likes sums")
    steps.text("four")
    # What a person opened stays open while the reply goes on.
    await expect(page.locator(".message.assistant .text")).to_have_text("four")
    await expect(page.locator(".tool pre").last).to_be_visible()
    steps.end()


async def test_a_tool_call_of_unknown_outcome_asks_and_takes_the_answer(page: Page, served: Served) -> None:
    async def asks(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        call_id = f"{run.run_id}:1:0"
        run.pending.append(resources.ToolCall(call_id=call_id, name="send_mail"))
        action = {"call_id": call_id, "kind": "unknown", "name": "send_mail", "arguments": {"to": "ada"}}
        yield "action.required", action
        await run.resolved.wait()
        yield "action.resolved", {"call_id": call_id, "decision": "retry"}
        yield "text.delta", {"text": "Sent."}
        yield COMPLETED

    served.mesh.script = asks
    await send(page, "send it")
    await expect(page.locator(".notice.warn")).to_contain_text("send_mail")
    await page.get_by_role("button", name="Run it again").click()
    await expect(page.locator(".message.assistant .text")).to_have_text("Sent.")
    run = next(iter(served.mesh.runs.values()))
    assert run.decisions == [(f"{run.run_id}:1:0", 3, "")]


@pytest.mark.parametrize(("button", "decision"), [("Run it", 5), ("Do not run it", 6)])
async def test_a_call_that_needs_approval_asks_while_the_run_goes_on(
    page: Page, served: Served, button: str, decision: int
) -> None:
    async def asks(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        call_id = f"{run.run_id}:1:0"
        action = {"call_id": call_id, "kind": "approval", "name": "send_mail", "arguments": {"to": "ada"}}
        yield "action.required", action
        yield "action.required", action
        await run.resolved.wait()
        # Decided, and the log does not say so yet.
        yield "text.delta", {"text": "Meanwhile."}
        await run.cancelled.wait()
        yield "run.cancelled", {"reason": "stopped"}

    served.mesh.script = asks
    await send(page, "send it")
    await expect(page.locator(".notice.warn")).to_have_count(1)
    await page.get_by_role("button", name=button, exact=True).click()
    await expect(page.locator(".message.assistant .text")).to_have_text("Meanwhile.")
    await expect(page.locator(".notice.warn")).to_have_count(0)
    run = next(iter(served.mesh.runs.values()))
    assert run.decisions == [(f"{run.run_id}:1:0", decision, "")]
    await page.keyboard.press("Escape")


async def test_a_failed_run_says_why_and_can_be_tried_again(page: Page, served: Served) -> None:
    failed = {"code": "UNAVAILABLE", "reason": "MODEL_UNAVAILABLE", "message": "no model", "retryable": True}

    async def fails_once(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        if run.ordinal == 1:
            yield "run.failed", failed
        yield "text.delta", {"text": "Now it works."}
        yield COMPLETED

    served.mesh.script = fails_once
    await send(page, "try")
    await expect(page.locator(".notice.bad")).to_contain_text("no model")
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".message.assistant .text")).to_have_text("Now it works.")
    await expect(page.locator(".message.user")).to_have_count(2)


async def test_markup_in_a_reply_stays_text_and_only_web_links_are_links(page: Page, served: Served) -> None:
    steps = Steps()
    served.mesh.script = steps.script
    await send(page, "<img src=x onerror=alert(1)>")
    await expect(page.locator(".message.user")).to_have_text("<img src=x onerror=alert(1)>")
    steps.text(
        "<script>alert(1)</script> **bold** `a<b` [ok](https://example.org/x) [no](javascript:alert(1))\n\n"
        "```html\n<b onclick=alert(1)>x</b>\n```\n\n- one\n- two"
    )
    steps.end()
    text = page.locator(".message.assistant .text")
    await expect(text.locator("strong")).to_have_text("bold")
    await expect(text.locator("p code")).to_have_text("a<b")
    await expect(text.locator("pre")).to_have_text("<b onclick=alert(1)>x</b>")
    await expect(text.locator("li")).to_have_count(2)
    await expect(text.locator("a")).to_have_attribute("href", "https://example.org/x")
    await expect(text.locator("a")).to_have_count(1)
    assert await text.locator("script, img, b").count() == 0
    assert "[no](javascript:alert(1))" in (await text.text_content() or "")


async def test_conversations_are_listed_renamed_and_deleted(page: Page, served: Served) -> None:
    await send(page, "first one")
    await expect(page.locator(".message.assistant .text")).to_have_text("first one")
    await page.keyboard.press("Alt+n")
    await expect(page.locator(".empty")).to_be_visible()
    await send(page, "second one")
    await expect(page.locator(".message.assistant .text")).to_have_text("second one")
    await expect(page.locator("#sessions a")).to_have_text(["second one", "first one"])
    await page.click("#sessions a >> text=first one")
    await expect(page.locator(".message.user")).to_have_text("first one")
    await page.click("#rename-button")
    await page.fill("#rename", "The first")
    await page.keyboard.press("Enter")
    await expect(page.locator("#title")).to_have_text("The first")
    await expect(page.locator("#sessions a[aria-current]")).to_have_text("The first")
    await page.click("#delete-button")
    await page.get_by_role("button", name="Delete", exact=True).last.click()
    await expect(page.locator("#sessions a")).to_have_text(["second one"])
    await page.go_back()
    await expect(page.locator("#title")).not_to_have_text("The first")


async def test_it_fits_a_phone(page: Page, served: Served) -> None:
    await page.set_viewport_size({"width": 390, "height": 780})
    await send(page, "word " * 60)
    await expect(page.locator(".message.assistant .text")).to_be_visible()
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390
    await expect(page.locator("#sidebar")).not_to_be_visible()
    await page.click("#open-sidebar")
    await expect(page.locator("#sidebar")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.locator("#sidebar")).not_to_be_visible()


async def test_input_that_is_refused_comes_back(page: Page, served: Served) -> None:
    await send(page, "one")
    await expect(page.locator(".message.assistant .text")).to_have_text("one")
    served.mesh.unary_error = FailedPreconditionError("RUN_FINISHED", "on command")
    await send(page, "two")
    await expect(page.locator("#status")).to_contain_text("It was not sent")
    await expect(page.locator("#input")).to_have_value("two")
    await expect(page.locator(".message.user")).to_have_count(1)


async def test_input_that_is_refused_when_it_is_sent_again_comes_back(page: Page, served: Served) -> None:
    """Its gateway gave no answer for a minute, on the page's clock."""
    await page.clock.install()

    async def lost(route: Route) -> None:
        await route.abort()

    async def refused(route: Route) -> None:
        await route.fulfill(status=409, json={"detail": "It is busy.", "reason": "SESSION_BUSY"})

    await page.route("**/v1/sessions/*/runs", lost)
    await send(page, "Keep these words")
    again = page.get_by_role("button", name="Send it again")
    async with asyncio.timeout(20):
        while not await again.is_visible():
            await page.clock.fast_forward(5_000)
    await page.unroute("**/v1/sessions/*/runs", lost)
    await page.route("**/v1/sessions/*/runs", refused)
    await again.click()
    await expect(page.locator("#status")).to_contain_text("It is busy.")
    await expect(page.locator("#input")).to_have_value("Keep these words")


async def test_the_documentation_shows_every_route(page: Page, served: Served) -> None:
    await page.goto(f"{served.url}/docs")
    await page.click("summary >> text=Sends input and streams the reply")
    await expect(page.locator("details[open]")).to_contain_text("Idempotency-Key")
