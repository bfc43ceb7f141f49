"""What a deleted session leaves in the object store is deleted, by the tool service, which has the store.

Nothing is looked for: PostgreSQL notes each session that was deleted, in the same transaction, and forgets
it once its results are gone. A session that is gone stays gone, so no result that is written meanwhile is in
danger.
"""

import asyncio
import random
from typing import Any

import grpc
import structlog

from hermesh.tool.v1 import tool_service_pb2 as tool_pb
from meshkit.errors import HermeshError
from meshkit.identity import TENANT_KEY
from services.session import metrics
from services.session.domain import GoneSession
from services.session.store.port import Gone

_log = structlog.get_logger("session.leftovers")

# Sessions of one round, one after the other: nobody waits for it.
_BATCH = 32
# After one round that was full, and after one that was not.
_NEXT_S = 0.5
_LONGEST_S = 30.0
_SHORTEST_S = 0.5
# What failed is tried again after this long; the tool service itself gives up sooner.
RETRY_SECONDS = 60.0
_CALL_SECONDS = 30.0


class Collector:
    """Has the results of deleted sessions deleted.

    Args:
        store: Knows which sessions were deleted.
        tools: The tool service's stub.
        grace_seconds: How long results outlive their session.
    """

    def __init__(self, store: Gone, tools: Any, *, grace_seconds: float) -> None:
        self._store = store
        self._tools = tools
        self._grace = grace_seconds
        self._interval = min(_LONGEST_S, max(_SHORTEST_S, grace_seconds / 4))

    async def run(self) -> None:
        """Does rounds until cancelled."""
        jitter = random.Random()  # noqa: S311 -- spreads load, keeps no secret
        while True:
            try:
                full = await self.round()
            except HermeshError as error:
                _log.warning("deleted sessions could not be looked up", error=str(error))
                full = False
            await asyncio.sleep(_NEXT_S if full else self._interval * jitter.uniform(0.8, 1.2))

    async def round(self) -> bool:
        """Deletes the results of some sessions; returns whether there may be more to do at once.

        Raises:
            HermeshError: The store does not answer.
        """
        metrics.gone_sessions.set(await self._store.count_gone())
        gone = await self._store.take_gone(_BATCH, grace_seconds=self._grace, retry_seconds=RETRY_SECONDS)
        for one in gone:
            try:
                more = await self._delete(one)
            except grpc.aio.AioRpcError as error:
                # So it would be with the others: they are taken again later, too.
                metrics.collections.labels("failed").inc()
                _log.warning(
                    "results of deleted sessions wait",
                    session_id=str(one.session_id),
                    code=error.code().name,
                    reason=error.details(),
                )
                return False
            metrics.collections.labels("more" if more else "done").inc()
            if not more:
                await self._store.forget_gone(one.session_id)
        return len(gone) == _BATCH

    async def _delete(self, one: GoneSession) -> bool:
        answer = await self._tools.DeleteResults(
            tool_pb.DeleteResultsRequest(session_id=str(one.session_id)),
            metadata=((TENANT_KEY, str(one.tenant_id)),),
            timeout=_CALL_SECONDS,
        )
        return bool(answer.more)
