"""Settling a tool call that waits for a person."""

import json
from uuid import UUID

from meshkit.clock import now_ms
from meshkit.errors import FieldViolation, InvalidArgumentError
from services.session.domain import NewEvent, Run, ToolCall
from services.session.store.port import Journal

_DECISIONS = {1: "completed", 2: "failed", 3: "retry", 4: "abandon"}


async def resolve(
    store: Journal, tenant_id: UUID, run_id: UUID, call_id: str, decision: int, content: str
) -> tuple[Run, ToolCall]:
    """Stores a person's word about a tool call and lets the run go on, or ends it.

    Args:
        store: The journal.
        tenant_id: Whose run it is.
        run_id: The run.
        call_id: The call.
        decision: A `session.v1.ActionDecision`.
        content: The result or the reason.

    Raises:
        NotFoundError: No such run or call.
        FailedPreconditionError: ACTION_NOT_REQUIRED.
        InvalidArgumentError: The content cannot be stored.
    """
    if "\x00" in content:
        raise InvalidArgumentError(
            "INVALID_ARGUMENT",
            "the content is not valid",
            violations=[FieldViolation("content", "must not hold the character U+0000")],
        )
    data = json.dumps(
        {"call_id": call_id, "decision": _DECISIONS[decision], "content": content},
        ensure_ascii=False,
        separators=(",", ":"),
    )
    event = NewEvent("action.resolved", now_ms(), data)
    return await store.resolve(tenant_id, run_id, call_id, decision, content, [event])
