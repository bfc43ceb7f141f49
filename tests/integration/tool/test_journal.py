"""What the executor may rely on, for the journal in memory and for the one behind gRPC."""

from collections.abc import AsyncIterator

import pytest

from meshkit.channel import open_channel
from meshkit.errors import NotFoundError, UnavailableError
from services.tool.domain import BeginOutcome, CallState, Entry, Outcome
from services.tool.journal import Journal, MeshJournal
from services.tool.registry import Effect
from tests.integration.tool.journal_server import mesh_settings, serve_journal
from tests.unit.tool.fakes import FakeJournal, call

CALL = "0192aaaa-0000-7000-8000-000000000003:1:0"


@pytest.fixture
def memory() -> FakeJournal:
    return FakeJournal()


@pytest.fixture(params=["memory", "mesh"])
async def journal(request: pytest.FixtureRequest, memory: FakeJournal) -> AsyncIterator[Journal]:
    if request.param == "memory":
        yield memory
        return
    async with serve_journal(memory) as address:
        settings = mesh_settings(mesh_address=address)
        async with open_channel(settings) as channel:
            yield MeshJournal(channel, settings)


async def test_an_intended_call_may_go_and_has_its_key(journal: Journal, memory: FakeJournal) -> None:
    memory.intend(CALL, Effect.IDEMPOTENT)
    outcome, entry = await journal.begin(call(CALL))
    assert outcome is BeginOutcome.GO
    assert entry == Entry(None, idempotency_key=f"key-{CALL}", effect=2)


@pytest.mark.parametrize("state", [CallState.COMPLETED, CallState.FAILED])
async def test_a_finished_call_is_done_with_its_result(
    journal: Journal, memory: FakeJournal, state: CallState
) -> None:
    memory.intend(CALL)
    await journal.begin(call(CALL))
    stored = await journal.complete(call(CALL), Outcome(state, "résult", "sha256:ab"))
    assert (stored.state, stored.content, stored.content_ref) == (state, "résult", "sha256:ab")
    outcome, entry = await journal.begin(call(CALL, fence=9))
    assert (outcome, entry) == (BeginOutcome.DONE, stored)


async def test_the_first_outcome_stays(journal: Journal, memory: FakeJournal) -> None:
    memory.intend(CALL)
    await journal.begin(call(CALL))
    await journal.complete(call(CALL), Outcome(CallState.COMPLETED, "first"))
    again = await journal.complete(call(CALL), Outcome(CallState.FAILED, "second"))
    assert (again.state, again.content) == (CallState.COMPLETED, "first")


@pytest.mark.parametrize(
    ("effect", "outcome"), [(Effect.PURE, BeginOutcome.GO), (Effect.NON_IDEMPOTENT, BeginOutcome.UNKNOWN)]
)
async def test_a_begun_call_goes_again_only_if_it_may(
    journal: Journal, memory: FakeJournal, effect: Effect, outcome: BeginOutcome
) -> None:
    memory.intend(CALL, effect)
    assert (await journal.begin(call(CALL)))[0] is BeginOutcome.GO
    assert (await journal.begin(call(CALL)))[0] is outcome


async def test_an_old_fence_is_told(journal: Journal, memory: FakeJournal) -> None:
    memory.intend(CALL)
    memory.fence = 3
    assert (await journal.begin(call(CALL, fence=2)))[0] is BeginOutcome.FENCED


async def test_errors_keep_their_type(journal: Journal, memory: FakeJournal) -> None:
    with pytest.raises(NotFoundError) as caught:
        await journal.begin(call(CALL))
    assert caught.value.reason == "TOOL_CALL_NOT_FOUND"
    memory.intend(CALL)
    memory.complete_errors = [UnavailableError("DATABASE_UNAVAILABLE", "away", retry_after_ms=5)]
    with pytest.raises(UnavailableError) as away:
        await journal.complete(call(CALL), Outcome(CallState.COMPLETED, "x"))
    assert (away.value.reason, away.value.retry_after_ms) == ("DATABASE_UNAVAILABLE", 5)


async def test_a_session_service_that_is_gone_is_unavailable() -> None:
    settings = mesh_settings(mesh_address="127.0.0.1:1")
    async with open_channel(settings) as channel:
        with pytest.raises(UnavailableError):
            await MeshJournal(channel, settings).begin(call(CALL))
