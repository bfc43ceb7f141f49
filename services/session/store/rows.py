"""Rows of PostgreSQL to the domain, and the domain's parts to what statements take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import orjson

from services.session.domain import (
    ConcurrencyPolicy,
    ContextPosition,
    EffectClass,
    Event,
    Grant,
    Message,
    NewMessage,
    NewToolCall,
    Run,
    RunContext,
    RunError,
    RunStatus,
    Session,
    Tenant,
    ToolCall,
    ToolCallState,
    Usage,
)

Row = Mapping[str, Any]

TITLE_CHARS = 60


def tenant_of(row: Row) -> Tenant:
    """Returns a tenant from its row."""
    return Tenant(
        tenant_id=row["tenant_id"],
        name=row["name"],
        concurrency=ConcurrencyPolicy(row["concurrency"]),
        approval_tools=row["approval_tools"],
        run_timeout_ms=row["run_timeout_ms"],
    )


def session_of(row: Row) -> Session:
    """Returns a session from a row of `session_view`."""
    return Session(
        session_id=row["session_id"],
        tenant_id=row["tenant_id"],
        title=row["title"],
        metadata=orjson.loads(row["metadata"]),
        agent=row["agent"],
        user=row["user_name"],
        create_time_ms=row["created_ms"],
        update_time_ms=row["updated_ms"],
        active_run_id=row["active_run_id"],
        message_count=row["message_count"],
    )


def message_of(row: Row) -> Message:
    """Returns a message from its row."""
    return Message(
        message_id=row["message_id"],
        session_id=row["session_id"],
        run_id=row["run_id"],
        ordinal=row["ordinal"],
        role=row["role"],
        content=row["content"],
        tool_calls=row["tool_calls"],
        tool_call_id=row["tool_call_id"],
        create_time_ms=row["created_ms"],
    )


def run_of(row: Row) -> Run:
    """Returns a run from a row of `run_view`."""
    error = None
    if row["error"] is not None:
        stored = orjson.loads(row["error"])
        error = RunError(stored["code"], stored["reason"], stored["message"], stored["retryable"])
    usage = None
    if row["input_tokens"] is not None:
        usage = Usage(row["input_tokens"], row["output_tokens"], row["cached_tokens"])
    return Run(
        run_id=row["run_id"],
        session_id=row["session_id"],
        tenant_id=row["tenant_id"],
        ordinal=row["ordinal"],
        status=RunStatus(row["status"]),
        model=row["model"],
        attempt=row["attempt"],
        last_seq=row["last_seq"],
        error=error,
        usage=usage,
        create_time_ms=row["created_ms"],
        finish_time_ms=row["finished_ms"],
        cancel_requested=row["cancel_requested"],
        cancel_reason=row["cancel_reason"],
        options=row["options"],
    )


def tool_call_of(row: Row) -> ToolCall:
    """Returns a journal entry from its row."""
    return ToolCall(
        call_id=row["call_id"],
        run_id=row["run_id"],
        session_id=row["session_id"],
        name=row["name"],
        arguments=row["arguments"],
        effect=EffectClass(row["effect"]),
        state=ToolCallState(row["state"]),
        content=row["content"],
        content_ref=row["content_ref"],
        idempotency_key=row["idempotency_key"],
        fence=row["fence"],
        needs_approval=row["needs_approval"],
        tries=row["tries"],
        quiet_in_ms=row["quiet_in_ms"],
    )


def grant_of(row: Row, run: Run, ttl_ms: int) -> Grant:
    """Returns the lease that a claim took."""
    return Grant(
        run.session_id,
        run.run_id,
        row["fence"],
        row["attach"],
        row["next_seq"],
        ttl_ms,
        max(1, row["time_left_ms"]),
    )


def context_of(text: str, run: Run) -> RunContext:
    """Returns the context of a claim from the JSON of `session.run_context`."""
    stored = orjson.loads(text)
    page = _page(run.session_id, run.run_id, stored)
    return replace(
        page,
        user=stored["user"],
        agent=stored["agent"],
        omitted_messages=stored["omitted"],
        approval_tools=stored["approval_tools"],
        written_bytes=stored["written"],
    )


def context_page_of(row: Row, run_id: UUID) -> RunContext:
    """Returns a page of a run's context from a row of `session.context_page`."""
    parts = {name: orjson.loads(row[name] or "null") for name in ("messages", "events", "tool_calls", "next")}
    return _page(row["session_id"], run_id, parts)


def _page(session_id: UUID, run_id: UUID, stored: Mapping[str, Any]) -> RunContext:
    return RunContext(
        messages=[
            Message(UUID(message_id), session_id, UUID(by), ordinal, role, content, calls, call_id, ms)
            for message_id, by, ordinal, role, content, calls, call_id, ms in stored["messages"] or ()
        ],
        events=[Event(run_id, seq, kind, ms, data) for seq, kind, ms, data in stored["events"] or ()],
        tool_calls=[
            ToolCall(
                call_id, run_id, session_id, name, arguments, EffectClass(effect), ToolCallState(state), *rest
            )
            for call_id, name, arguments, effect, state, *rest in stored["tool_calls"] or ()
        ],
        user="",
        agent="",
        next=ContextPosition(*stored["next"]) if stored["next"] else None,
    )


def messages_json(messages: Sequence[NewMessage]) -> str | None:
    """Returns messages as `append_step` takes them; None for none."""
    if not messages:
        return None
    return orjson.dumps(
        [[str(m.message_id), m.role, m.content, m.tool_calls, m.tool_call_id] for m in messages]
    ).decode()


def intents_json(intents: Sequence[NewToolCall]) -> str | None:
    """Returns tool calls as `append_step` takes them; None for none."""
    if not intents:
        return None
    return orjson.dumps(
        [
            [c.call_id, c.name, c.arguments, int(c.effect), c.idempotency_key, c.needs_approval]
            for c in intents
        ]
    ).decode()


def error_json(error: RunError | None) -> str | None:
    """Returns a run's error as its column holds it."""
    if error is None:
        return None
    return orjson.dumps(
        {
            "code": error.code,
            "reason": error.reason,
            "message": error.message,
            "retryable": error.retryable,
        }
    ).decode()


def title_of(messages: Sequence[tuple[str, str]]) -> str:
    """Returns the title that a session gets from its first input: how its first user message begins."""
    for role, content in messages:
        if role == "user":
            return " ".join(content[: TITLE_CHARS * 4].split())[:TITLE_CHARS].rstrip()
    return ""
