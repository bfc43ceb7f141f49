"""The collector: what it asks of the tool service, and what it makes of the answers."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from hermesh.tool.v1 import tool_service_pb2 as tool_pb
from services.session.domain import GoneSession
from services.session.leftovers import Collector


class Store:
    """Deleted sessions in memory."""

    def __init__(self, *gone: GoneSession) -> None:
        self.gone = list(gone)
        self.graces: list[float] = []

    async def take_gone(self, limit: int, *, grace_seconds: float, retry_seconds: float) -> list[GoneSession]:
        self.graces.append(grace_seconds)
        return self.gone[:limit]

    async def forget_gone(self, session_id: UUID) -> None:
        self.gone = [one for one in self.gone if one.session_id != session_id]

    async def count_gone(self) -> int:
        return len(self.gone)


class Tools:
    """The tool service's stub; it answers as it is told."""

    def __init__(self, *answers: tool_pb.DeleteResultsResponse | grpc.StatusCode) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str]] = []

    async def DeleteResults(self, request: Any, *, metadata: Any, timeout: float) -> Any:
        self.asked.append((request.session_id, dict(metadata)["x-hermesh-tenant"]))
        answer = self.answers.pop(0) if self.answers else tool_pb.DeleteResultsResponse()
        if isinstance(answer, grpc.StatusCode):
            raise grpc.aio.AioRpcError(answer, grpc.aio.Metadata(), grpc.aio.Metadata(), "away")
        return answer


def some(number: int) -> list[GoneSession]:
    return [GoneSession(uuid4(), uuid4()) for _ in range(number)]


def collector(store: Store, tools: Tools) -> Collector:
    return Collector(store, tools, grace_seconds=60.0)


async def test_each_is_asked_for_in_its_tenants_name_and_forgotten() -> None:
    gone = some(2)
    store, tools = Store(*gone), Tools()
    assert not await collector(store, tools).round()
    assert tools.asked == [(str(one.session_id), str(one.tenant_id)) for one in gone]
    assert (store.gone, store.graces) == ([], [60.0])


async def test_one_of_which_there_is_more_is_kept() -> None:
    first, second = gone = some(2)
    store, tools = Store(*gone), Tools(tool_pb.DeleteResultsResponse(deleted=1000, more=True))
    await collector(store, tools).round()
    assert store.gone == [first]
    assert len(tools.asked) == 2
    assert second not in store.gone


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED])
async def test_a_failure_ends_the_round_and_nothing_is_forgotten(code: grpc.StatusCode) -> None:
    gone = some(3)
    store, tools = Store(*gone), Tools(code)
    assert not await collector(store, tools).round()
    assert (store.gone, len(tools.asked)) == (gone, 1)


async def test_a_round_is_bounded_and_says_that_there_is_more() -> None:
    store, tools = Store(*some(40)), Tools()
    assert await collector(store, tools).round()
    assert len(tools.asked) == 32
    assert not await collector(store, tools).round()
    assert store.gone == []
