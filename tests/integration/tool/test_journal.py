"""What the executor may rely on: for the journal in memory, the same behind gRPC, and the session service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import count
from typing import Protocol

import pytest

from meshkit.channel import open_channel
from meshkit.errors import NotFoundError, UnavailableError
from services.tool.domain import BeginOutcome, CallRequest, CallState, Outcome
from services.tool.journal import Journal, MeshJournal
from services.tool.registry import Effect
from tests.integration.session.process import MESH_TOKEN, SessionProcess, connect
from tests.integration.tool.journal_server import mesh_settings, serve_journal
from tests.integration.tool.session_bench import SessionBench
from tests.unit.session.calls import new_writer
from tests.unit.tool.fakes import FakeJournal, call


class Bench(Protocol):
    """A journal and a run that the tests make calls for."""

    journal: Journal

    async def intend(self, effect: Effect = Effect.PURE) -> CallRequest:
        """Stores the intent of a call and returns it under the present fence."""
        ...

    async def take_over(self, request: CallRequest) -> CallRequest:
        """Gives the session to another holder; returns the call under its fence."""
        ...


class FakeBench:
    """Over a `FakeJournal`, reached directly or through gRPC."""

    def __init__(self, memory: FakeJournal, journal: Journal) -> None:
        self._memory = memory
        self.journal = journal
        self._numbers = count()

    async def intend(self, effect: Effect = Effect.PURE) -> CallRequest:
        call_id = f"run:1:{next(self._numbers)}"
        self._memory.intend(call_id, effect)
        return call(call_id, fence=self._memory.fence)

    async def take_over(self, request: CallRequest) -> CallRequest:
        self._memory.fence += 1
        return replace(request, fence=self._memory.fence)


@pytest.fixture(params=["memory", "grpc", "session"])
def kind(request: pytest.FixtureRequest) -> str | SessionProcess:
    """Which journal; a process is started here, outside of the tests' event loop."""
    name: str = request.param
    return request.getfixturevalue("session_process") if name == "session" else name


@pytest.fixture
async def bench(kind: str | SessionProcess) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        if isinstance(kind, SessionProcess):
            process = kind
            settings = mesh_settings(mesh_address=process.address, token=MESH_TOKEN)
            channel = await stack.enter_async_context(open_channel(settings))
            client = await stack.enter_async_context(connect(process))
            yield SessionBench(MeshJournal(channel, settings), client, await new_writer(client))
            return
        memory = FakeJournal()
        if kind == "memory":
            yield FakeBench(memory, memory)
            return
        address = await stack.enter_async_context(serve_journal(memory))
        settings = mesh_settings(mesh_address=address)
        channel = await stack.enter_async_context(open_channel(settings))
        yield FakeBench(memory, MeshJournal(channel, settings))


async def test_an_intended_call_may_go_and_has_its_key(bench: Bench) -> None:
    request = await bench.intend(Effect.IDEMPOTENT)
    outcome, entry = await bench.journal.begin(request)
    assert outcome is BeginOutcome.GO
    assert (entry.state, entry.effect) == (None, Effect.IDEMPOTENT)
    assert entry.idempotency_key == f"key-{request.call_id}"


@pytest.mark.parametrize("state", [CallState.COMPLETED, CallState.FAILED])
async def test_a_finished_call_is_done_with_its_result(bench: Bench, state: CallState) -> None:
    request = await bench.intend()
    await bench.journal.begin(request)
    stored = await bench.journal.complete(request, Outcome(state, "résult", "sha256:ab"))
    assert (stored.state, stored.content, stored.content_ref) == (state, "résult", "sha256:ab")
    assert await bench.journal.begin(request) == (BeginOutcome.DONE, stored)
    assert await bench.journal.begin(await bench.take_over(request)) == (BeginOutcome.DONE, stored)


async def test_the_first_outcome_stays(bench: Bench) -> None:
    request = await bench.intend()
    await bench.journal.begin(request)
    await bench.journal.complete(request, Outcome(CallState.COMPLETED, "first"))
    again = await bench.journal.complete(request, Outcome(CallState.FAILED, "second"))
    assert (again.state, again.content) == (CallState.COMPLETED, "first")


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (Effect.PURE, BeginOutcome.GO),
        (Effect.IDEMPOTENT, BeginOutcome.GO),
        (Effect.NON_IDEMPOTENT, BeginOutcome.UNKNOWN),
    ],
)
@pytest.mark.parametrize("moved", [False, True])
async def test_a_begun_call_goes_again_only_if_it_may(
    bench: Bench, effect: Effect, expected: BeginOutcome, moved: bool
) -> None:
    request = await bench.intend(effect)
    assert (await bench.journal.begin(request))[0] is BeginOutcome.GO
    if moved:
        request = await bench.take_over(request)
    assert (await bench.journal.begin(request))[0] is expected


async def test_an_old_fence_is_told(bench: Bench) -> None:
    request = await bench.intend()
    current = await bench.take_over(request)
    assert (await bench.journal.begin(request))[0] is BeginOutcome.FENCED
    assert (await bench.journal.begin(current))[0] is BeginOutcome.GO


async def test_an_act_that_ends_after_a_takeover_is_still_recorded(bench: Bench) -> None:
    request = await bench.intend(Effect.NON_IDEMPOTENT)
    await bench.journal.begin(request)
    current = await bench.take_over(request)
    assert (await bench.journal.begin(current))[0] is BeginOutcome.UNKNOWN
    entry = await bench.journal.complete(request, Outcome(CallState.COMPLETED, "done"))
    assert (entry.state, entry.content) == (CallState.COMPLETED, "done")


async def test_a_try_that_was_replaced_records_nothing(bench: Bench) -> None:
    request = await bench.intend(Effect.PURE)
    await bench.journal.begin(request)
    await bench.journal.begin(await bench.take_over(request))
    entry = await bench.journal.complete(request, Outcome(CallState.COMPLETED, "old"))
    assert entry.state is None


async def test_an_unknown_outcome_is_kept(bench: Bench) -> None:
    request = await bench.intend(Effect.NON_IDEMPOTENT)
    await bench.journal.begin(request)
    entry = await bench.journal.complete(request, Outcome(CallState.UNKNOWN, "?"))
    assert entry.state is CallState.UNKNOWN
    assert (await bench.journal.begin(request))[0] is BeginOutcome.UNKNOWN


async def test_a_call_that_nobody_intended_is_not_found(bench: Bench) -> None:
    request = replace(await bench.intend(), call_id="nobody:1:0")
    for attempt in (
        bench.journal.begin(request),
        bench.journal.complete(request, Outcome(CallState.FAILED, "x")),
    ):
        with pytest.raises(NotFoundError) as caught:
            await attempt
        assert caught.value.reason == "TOOL_CALL_NOT_FOUND"


async def test_errors_keep_their_type_over_grpc() -> None:
    memory = FakeJournal()
    memory.intend("run:1:0")
    memory.complete_errors = [UnavailableError("DATABASE_UNAVAILABLE", "away", retry_after_ms=5)]
    async with serve_journal(memory) as address:
        settings = mesh_settings(mesh_address=address)
        async with open_channel(settings) as channel:
            with pytest.raises(UnavailableError) as away:
                await MeshJournal(channel, settings).complete(call(), Outcome(CallState.COMPLETED, "x"))
    assert (away.value.reason, away.value.retry_after_ms) == ("DATABASE_UNAVAILABLE", 5)


async def test_a_session_service_that_is_gone_is_unavailable() -> None:
    settings = mesh_settings(mesh_address="127.0.0.1:1")
    async with open_channel(settings) as channel:
        with pytest.raises(UnavailableError):
            await MeshJournal(channel, settings).begin(call())


async def unknown(bench: Bench, act_seconds: float = 0.0) -> CallRequest:
    request = await bench.intend(Effect.NON_IDEMPOTENT)
    go, entry = await bench.journal.begin(request, act_seconds)
    assert (go, entry.tries) == (BeginOutcome.GO, 1)
    await bench.journal.complete(request, Outcome(CallState.UNKNOWN, "?"), 1)
    return request


async def test_what_was_found_is_the_outcome_of_an_unknown_call(bench: Bench) -> None:
    request = await unknown(bench, 60.0)
    looked = await bench.journal.look(request)
    assert (looked.state, looked.tries, looked.may_begin) == (CallState.UNKNOWN, 1, False)
    assert 50 < looked.quiet_in <= 60
    found = Outcome(CallState.COMPLETED, "found", "sha256:ab")
    assert (await bench.journal.reconcile(request, found, 7)).state is CallState.UNKNOWN
    entry = await bench.journal.reconcile(request, found, 1)
    assert (entry.state, entry.content, entry.content_ref) == (CallState.COMPLETED, "found", "sha256:ab")
    assert (await bench.journal.begin(request))[0] is BeginOutcome.DONE


async def test_what_was_not_done_may_begin_again_when_nothing_acts_any_more(bench: Bench) -> None:
    request = await unknown(bench, 60.0)
    entry = await bench.journal.reconcile(request, None, 1)
    assert (entry.state, entry.may_begin) == (CallState.UNKNOWN, False)
    assert entry.quiet_in > 50
    request = await unknown(bench)
    entry = await bench.journal.reconcile(request, None, 1)
    assert (entry.state, entry.may_begin) == (None, True)
    go, entry = await bench.journal.begin(request)
    assert (go, entry.tries) == (BeginOutcome.GO, 2)
