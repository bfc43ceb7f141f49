"""What the chat page makes of events: its modules (gateway/web) in a real Chromium, without a gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page, Route, async_playwright

from tests.e2e.browser import LEFT_OUT, find_or_install

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEB = Path(__file__).resolve().parents[2] / "gateway" / "web"
CALL = "r:1:0"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page() -> AsyncIterator[Page]:
    browser = await asyncio.to_thread(find_or_install)
    if browser is None:
        pytest.skip(LEFT_OUT)

    async def serve(route: Route) -> None:
        path = WEB / route.request.url.rpartition("/")[2]
        if path.suffix == ".js":
            await route.fulfill(body=path.read_bytes(), content_type="text/javascript")
        else:
            await route.fulfill(body="<!doctype html>", content_type="text/html")

    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(
            executable_path=browser.path, args=list(browser.flags), timeout=60_000
        )
        opened = await launched.new_page()
        await opened.route("http://page.test/**", serve)
        await opened.goto("http://page.test/")
        yield opened
        await launched.close()


def log(*events: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A run's events, as the API has them."""
    return [
        {"run_id": "r", "seq": seq, "type": kind, "data": data, "time": 1_700_000_000_000}
        for seq, (kind, data) in enumerate(events, start=1)
    ]


CREATED = ("run.created", {"ordinal": 1, "input": [{"role": "user", "content": "hi"}]})
STARTED = ("run.started", {"attempt": 1})
STEP = ("step.started", {"step": 1})
CALLED = ("tool.call", {"call_id": CALL, "name": "send_mail", "arguments": '{"to": "ada"}', "effect": "pure"})
ASKED = ("action.required", {"call_id": CALL, "kind": "approval", "name": "send_mail", "arguments": "{}"})
COMPLETED = ("run.completed", {"finish_reason": "stop"})
CANCELLED = ("run.cancelled", {"reason": "stopped at the chat page"})


def result(status: str, content: str = "x") -> tuple[str, dict[str, Any]]:
    return "tool.result", {"call_id": CALL, "status": status, "content": content}


def decided(word: str, **more: str) -> tuple[str, dict[str, Any]]:
    return "action.resolved", {"call_id": CALL, "decision": word, **more}


FOLD = """async (events) => {
  const { fold, newRun, callState, callWords, decisionWords } = await import("/fold.js");
  const run = newRun(events[0].run_id);
  for (const event of events) fold(run, event);
  const tool = run.items.find((item) => item.kind === "tool");
  const action = run.items.find((item) => item.kind === "action");
  return {
    run, state: tool && callState(run, tool), words: tool && callWords(run, tool),
    decision: action && decisionWords(run, action),
  };
}"""


async def folded(page: Page, events: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = await page.evaluate(FOLD, events)
    return found


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([CALLED], "called"),
        ([CALLED, ("tool.progress", {"call_id": CALL, "text": "1 of 2"})], "working"),
        ([CALLED, ASKED], "waiting"),
        ([CALLED, ASKED, decided("approve", content="")], "called"),
        ([CALLED, result("completed"), COMPLETED], "completed"),
        ([CALLED, result("failed"), COMPLETED], "failed"),
        ([CALLED, ASKED, decided("deny", content="A person did not allow it."), result("failed")], "denied"),
        ([CALLED, ASKED, decided("failed", content="no"), result("failed")], "failed"),
        ([CALLED, result("unknown")], "unknown"),
        ([CALLED, result("unknown"), result("completed")], "completed"),
        (
            [CALLED, result("unknown"), ("tool.reconciled", {"call_id": CALL, "finding": "not_done"})],
            "working",
        ),
        ([CALLED, CANCELLED], "lost"),
        ([CALLED, ASKED, CANCELLED], "lost"),
    ],
)
async def test_what_became_of_a_call_is_said_as_it_is(
    page: Page, events: list[tuple[str, dict[str, Any]]], state: str
) -> None:
    found = await folded(page, log(CREATED, STARTED, STEP, *events))
    assert found["state"] == state
    assert (found["words"] == "completed") is (state == "completed")


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([ASKED], ""),
        ([ASKED, decided("approve", content="")], "send_mail: approved, by a person on "),
        ([ASKED, decided("deny", content="no")], "send_mail: denied, by a person on "),
        ([ASKED, decided("completed")], "send_mail: it was done, as its tool found out on "),
        ([ASKED, CANCELLED], "send_mail: nobody decided before the run ended."),
    ],
)
async def test_the_trace_of_a_decision_stays(
    page: Page, events: list[tuple[str, dict[str, Any]]], words: str
) -> None:
    found = await folded(page, log(CREATED, STARTED, CALLED, *events))
    assert found["decision"].startswith(words)
    assert bool(found["decision"]) is bool(words)


async def test_a_run_that_was_stopped_in_the_queue_keeps_its_input(page: Page) -> None:
    run = (await folded(page, log(CREATED, CANCELLED)))["run"]
    assert (run["status"], run["started"], run["items"]) == ("cancelled", False, [])
    assert run["input"] == [{"role": "user", "content": "hi"}]
    run = (await folded(page, log(CREATED, STARTED, CANCELLED)))["run"]
    assert [item["text"] for item in run["items"]] == ["Stopped."]


async def test_what_a_lost_attempt_wrote_is_taken_back(page: Page) -> None:
    before = [CREATED, STARTED, STEP, ("text.delta", {"text": "kept "})]
    lost = [
        ("text.delta", {"text": "lost"}),
        ("reasoning.delta", {"text": "lost"}),
        CALLED,
        ASKED,
        decided("approve", content=""),
        result("completed"),
    ]
    again = [("attempt.reset", {"from_seq": 5}), ("text.delta", {"text": "again"}), CALLED]
    found = await folded(page, log(*before, *lost, *again))
    text = "".join(
        piece for item in found["run"]["items"] if item["kind"] == "text" for _, piece in item["pieces"]
    )
    assert text == "kept again"
    assert [item["kind"] for item in found["run"]["items"]] == ["step", "text", "tool"]
    assert found["state"] == "called"


async def test_events_that_come_twice_change_nothing_and_a_gap_is_an_error(page: Page) -> None:
    events = log(CREATED, STARTED, STEP, ("text.delta", {"text": "a"}), CALLED, result("failed"), COMPLETED)
    twice = [event for pair in zip(events, events, strict=True) for event in pair]
    whole = await folded(page, events)
    assert await folded(page, [*twice, *events]) == whole
    with pytest.raises(Exception, match="event 4 after 2"):
        await folded(page, [*events[:2], *events[3:]])


async def test_messages_stand_for_a_log_that_is_gone_and_claim_no_more_than_they_know(page: Page) -> None:
    row = {
        "run_id": "r",
        "ordinal": 3,
        "status": "failed",
        "attempt": 1,
        "create_time_ms": 1,
        "error": {"message": "no model"},
        "usage": {"input_tokens": 1, "output_tokens": 2},
    }
    calls = [{"call_id": CALL, "name": "send_mail", "arguments": '{"n": 1}'}]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "content": "x", "tool_call_id": CALL},
    ]
    script = """async ([row, messages]) => {
      return (await import("/fold.js")).eventsOfMessages(row, messages);
    }"""
    found = await folded(page, await page.evaluate(script, [row, messages]))
    assert found["words"] == "answered"
    kinds = [item["kind"] for item in found["run"]["items"]]
    assert kinds == ["step", "text", "tool", "usage", "failed"]
    assert found["run"]["input"] == [{"role": "user", "content": "hi"}]
    assert found["run"]["status"] == "failed"


EXACT = [
    '{"n":18446744073709551617,"x":1.0,"e":1E400}',
    '{ "a" : 1, "a" : 2 }',
    '{"q":"}]\\"\\\\","arguments":{"deep":[[{}]]}}',
    "[]",
    "12345678901234567890123",
    "[" * 3000 + "]" * 3000,
]


@pytest.mark.parametrize("arguments", EXACT)
async def test_arguments_are_the_text_that_the_model_wrote(page: Page, arguments: str) -> None:
    text = '{"data":{"name":"arguments","arguments":' + arguments + ',"z":[{"arguments":"text"}]},"n":2}'
    found = await page.evaluate("async (text) => (await import('/json.js')).parse(text)", text)
    assert found["data"] == {"name": "arguments", "arguments": arguments, "z": [{"arguments": "text"}]}
    shown = await page.evaluate("async (text) => (await import('/json.js')).indent(text)", arguments)
    assert "".join(shown.split()) == "".join(arguments.split())


async def test_json_is_laid_out_and_what_is_none_stays_as_it_is(page: Page) -> None:
    indent = "async (text) => (await import('/json.js')).indent(text)"
    assert await page.evaluate(indent, '{"a":{"b":[1,"x y"]},"c":{}}') == json.dumps(
        {"a": {"b": [1, "x y"]}, "c": {}}, indent=2
    )
    for text in ("plain words", '{"a":', "", "[1,,2]"):
        assert await page.evaluate(indent, text) == text
