"""Settling a tool call that waits for a person."""

import json
from uuid import UUID

from meshkit.clock import now_ms
from meshkit.errors import FieldViolation, InvalidArgumentError
from services.session.domain import ActionDecision, Decision, Run, ToolCall
from services.session.operations.submit import check_text, fingerprint
from services.session.store.port import Journal

# What the model reads where a person said no more than that.
_CONTENT = {
    ActionDecision.COMPLETED: "A person confirms that it was done.",
    ActionDecision.FAILED: "A person says that it was not done.",
    ActionDecision.DENY: "A person did not allow it.",
}


async def resolve(
    store: Journal,
    tenant_id: UUID,
    run_id: UUID,
    call_id: str,
    decision: ActionDecision,
    content: str,
    request_id: str,
) -> tuple[Run, ToolCall]:
    """Stores a person's word about a tool call and lets the run go on, or ends it.

    Args:
        store: The journal.
        tenant_id: Whose run it is.
        run_id: The run.
        call_id: The call.
        decision: What is to become of it.
        content: The result or the reason.
        request_id: The caller's idempotency key, or empty.

    Raises:
        NotFoundError: No such run or call.
        FailedPreconditionError: ACTION_NOT_REQUIRED.
        AlreadyExistsError: REQUEST_ID_REUSED.
        InvalidArgumentError: A text cannot be stored.
    """
    violations: list[FieldViolation] = []
    check_text("content", content, violations)
    check_text("request_id", request_id, violations)
    check_text("call_id", call_id, violations)
    if violations:
        raise InvalidArgumentError("INVALID_ARGUMENT", "the decision is not valid", violations=violations)
    said = content or _CONTENT.get(decision, "")
    data = json.dumps(
        {"call_id": call_id, "decision": decision.name.lower(), "content": said},
        ensure_ascii=False,
        separators=(",", ":"),
    )
    word = Decision(
        decision=decision,
        content=said,
        request_id=request_id,
        fingerprint=fingerprint("action", run_id.bytes, call_id, str(int(decision)), content),
        time_ms=now_ms(),
        data=data,
    )
    return await store.resolve(tenant_id, run_id, call_id, word)
