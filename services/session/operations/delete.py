"""Deleting a session, its tools' acts first."""

import asyncio
import time
from uuid import UUID

from meshkit.context import remaining
from meshkit.errors import FailedPreconditionError, NotFoundError
from meshkit.tasks import Backoff
from services.session.commits import Commits
from services.session.domain import ToolCall
from services.session.store.port import Store

# Longer than a tool that nobody tells takes to ask whether its run goes on, and to stop then.
WAIT_SECONDS = 6.0
# What is kept of the caller's time to answer it.
_ANSWER_SECONDS = 0.5
_REASON = "the session was deleted"
_RETRY_MS = 2_000
_NAMED = 5


async def delete_session(
    store: Store, commits: Commits, tenant_id: UUID, session_id: UUID, *, seconds: float = WAIT_SECONDS
) -> None:
    """Deletes a session with all that hangs on it. When it returns, no call of the session acts or will.

    A call that acts has its run cancelled, which stops it, and is waited for; one that was not begun never
    will be.

    Args:
        store: Where the session is.
        commits: Told of what was changed.
        tenant_id: Whose session it is.
        session_id: The session.
        seconds: How long calls are waited for at most.

    Raises:
        NotFoundError: SESSION_NOT_FOUND.
        FailedPreconditionError: CALLS_UNDER_WAY: calls still act. Nothing was deleted; their runs are
            cancelled.
    """
    left = remaining()
    end = time.monotonic() + (seconds if left is None else min(seconds, left - _ANSWER_SECONDS))
    backoff = Backoff(0.02, 0.25)
    cancelled: set[UUID] = set()
    while calls := await store.delete_session(tenant_id, session_id):
        for run_id in {call.run_id for call in calls} - cancelled:
            cancelled.add(run_id)
            await _cancel(store, commits, tenant_id, run_id)
        wait = backoff.next()
        if time.monotonic() + wait > end:
            raise _under_way(calls)
        await asyncio.sleep(wait)
    commits.deleted(session_id)


async def _cancel(store: Store, commits: Commits, tenant_id: UUID, run_id: UUID) -> None:
    try:
        run, event = await store.cancel(tenant_id, run_id, _REASON)
    except NotFoundError:
        # Somebody else deleted the session meanwhile.
        return
    commits.cancelled(run, event)


def _under_way(calls: list[ToolCall]) -> FailedPreconditionError:
    named = ", ".join(f"{call.call_id} ({call.name})" for call in calls[:_NAMED])
    return FailedPreconditionError(
        "CALLS_UNDER_WAY",
        "tool calls of the session still act, although they were told to stop; nothing was deleted, and "
        "nothing more begins in their runs: delete it again",
        metadata={"calls": named},
        retry_after_ms=_RETRY_MS,
    )
