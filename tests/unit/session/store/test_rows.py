"""Rows to the domain and back, without a database."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest

from meshkit.ids import uuid7
from services.session.domain import (
    ContextPosition,
    EffectClass,
    NewMessage,
    NewToolCall,
    RunError,
    RunStatus,
    ToolCallState,
    Usage,
)
from services.session.store import rows

ID = uuid7()


def run_row(**changes: Any) -> dict[str, Any]:
    return {
        "run_id": ID,
        "session_id": ID,
        "tenant_id": ID,
        "ordinal": 1,
        "status": 2,
        "model": "m",
        "attempt": 1,
        "last_seq": 3,
        "error": None,
        "input_tokens": None,
        "output_tokens": None,
        "cached_tokens": None,
        "created_ms": 5,
        "finished_ms": 0,
        "cancel_requested": False,
        "cancel_reason": "",
        "options": b"o",
        **changes,
    }


def test_a_run_has_error_and_usage_only_where_they_are_stored() -> None:
    run = rows.run_of(run_row())
    assert (run.status, run.error, run.usage) == (RunStatus.RUNNING, None, None)
    error = RunError("INTERNAL", "TURN_LIMIT", "too many", False)
    failed = rows.run_of(
        run_row(error=rows.error_json(error), input_tokens=1, output_tokens=0, cached_tokens=0)
    )
    assert (failed.error, failed.usage) == (error, Usage(1, 0, 0))


def test_what_is_not_there_is_null_and_not_an_empty_array() -> None:
    assert rows.messages_json(()) is None
    assert rows.intents_json(()) is None
    assert rows.error_json(None) is None


def test_messages_and_intents_keep_their_text() -> None:
    message = NewMessage(ID, "assistant", 'é"\n', "[1]", "c")
    assert json.loads(rows.messages_json([message]) or "") == [[str(ID), "assistant", 'é"\n', "[1]", "c"]]
    call = NewToolCall("c", "n", '{"a": 1}', EffectClass.PURE, "k")
    assert json.loads(rows.intents_json([call]) or "") == [["c", "n", '{"a": 1}', 1, "k", False]]


def test_a_context_is_read_with_its_parts_in_order() -> None:
    text = json.dumps(
        {
            "messages": [[str(ID), str(ID), 1, "user", "x", "", "", 7]],
            "events": [[2, "step.started", 8, '{"step": 1}']],
            "tool_calls": [["c", "n", "{}", 3, 5, "out", "", "k", 9]],
            "user": "u",
            "agent": "a",
            "omitted": 4,
            "approval_tools": ["pay", "*"],
            "next": [3, 2, 1],
            "written": 77,
        }
    )
    context = rows.context_of(text, rows.run_of(run_row()))
    (message,) = context.messages
    assert (message.message_id, message.session_id, message.ordinal, message.content) == (ID, ID, 1, "x")
    (event,) = context.events
    assert (event.run_id, event.seq, event.data) == (ID, 2, '{"step": 1}')
    (call,) = context.tool_calls
    assert (call.effect, call.state) == (EffectClass.NON_IDEMPOTENT, ToolCallState.UNKNOWN)
    assert (call.content, call.content_ref, call.idempotency_key, call.fence) == ("out", "", "k", 9)
    assert (context.user, context.agent, context.omitted_messages) == ("u", "a", 4)
    assert list(context.approval_tools) == ["pay", "*"]
    assert (context.next, context.written_bytes) == (ContextPosition(3, 2, 1), 77)
    assert isinstance(message.message_id, UUID)


def test_an_empty_context_is_empty() -> None:
    nothing = dict.fromkeys(("messages", "events", "tool_calls", "next"))
    rest = {"user": "", "agent": "", "omitted": 0, "approval_tools": [], "written": 0}
    text = json.dumps(nothing | rest)
    context = rows.context_of(text, rows.run_of(run_row()))
    assert not context.messages
    assert not context.events
    assert not context.tool_calls
    assert context.next is None


@pytest.mark.parametrize(
    ("messages", "title"),
    [
        ([("user", "hello")], "hello"),
        ([("system", "be kind"), ("user", "  a\n\tb  ")], "a b"),
        ([("user", "x" * 100)], "x" * 60),
        ([("user", "x" * 59 + " y")], "x" * 59),
        ([("system", "be kind")], ""),
        ([("user", " " * 500 + "far")], ""),
    ],
)
def test_a_title_is_how_the_first_user_message_begins(messages: list[tuple[str, str]], title: str) -> None:
    assert rows.title_of(messages) == title
