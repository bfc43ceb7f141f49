"""Accepting input: once for each request id, in the order of the session, in one transaction."""

from __future__ import annotations

import asyncio
import json

import orjson
import pytest

from meshkit.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from meshkit.ids import uuid7
from services.session.domain import AppendOutcome, ConcurrencyPolicy, RunStatus
from tests.integration.session.store.kit import Kit, event, ref


async def test_input_becomes_a_queued_run_with_its_first_event(kit: Kit) -> None:
    session = await kit.session(agent='a"gent')
    submitted = await kit.submit(session.session_id, "Hallo ☃", '"quoted" \\ \n')
    run, created = submitted.run, submitted.created
    assert (run.ordinal, run.status, run.attempt, run.last_seq) == (1, RunStatus.QUEUED, 0, 1)
    assert (run.model, run.options, run.tenant_id) == ("m", b"\x01\x00", kit.tenant)
    assert submitted.claim is None
    assert json.loads(created.data) == {
        "session_id": str(session.session_id),
        "ordinal": 1,
        "input": [
            {"role": "user", "content": "Hallo ☃"},
            {"role": "user", "content": '"quoted" \\ \n'},
        ],
        "agent": 'a"gent',
        "model": "m",
    }
    # Compact, as its other events are: nothing re-serialises it on the way to a reader.
    assert created.data == orjson.dumps(orjson.loads(created.data)).decode()
    assert await kit.log(run.run_id) == [created]
    assert await kit.store.get_run(kit.tenant, run.run_id) == run


async def test_what_was_accepted_is_known_by_its_key_to_its_tenant(kit: Kit) -> None:
    session = await kit.session()
    await kit.submit(session.session_id, "one", request_id="key")
    assert await kit.store.accepted(kit.tenant, "key")
    assert not await kit.store.accepted(kit.tenant, "other")
    assert not await kit.store.accepted(uuid7(), "key")


async def test_submit_with_an_owner_takes_a_free_session_in_the_same_call(kit: Kit) -> None:
    session = await kit.session(user="ann", agent="writer")
    submitted = await kit.submit(session.session_id, "one", "two", owner="a")
    claim = submitted.claim
    assert claim is not None
    assert claim.grant is not None
    assert claim.context is not None
    assert submitted.run.status is RunStatus.RUNNING
    assert (claim.grant.fence, claim.grant.attach, claim.grant.next_seq) == (1, 0, 2)
    assert [m.content for m in claim.context.messages] == ["one", "two"]
    assert (claim.context.user, claim.context.agent, claim.context.omitted_messages) == ("ann", "writer", 0)
    assert claim.run == submitted.run
    assert (await kit.store.get_session(kit.tenant, session.session_id)).active_run_id == submitted.run.run_id
    assert (await kit.append(claim.grant, 2)).outcome is AppendOutcome.COMMITTED


async def test_submit_with_an_owner_on_a_busy_session_queues(kit: Kit) -> None:
    grant = await kit.started()
    second = await kit.submit(grant.session_id, owner="b")
    assert second.claim is None
    assert second.run.status is RunStatus.QUEUED
    assert second.run.ordinal == 2


async def test_only_one_of_many_at_once_gets_the_session(kit: Kit) -> None:
    session = await kit.session()
    submitted = await asyncio.gather(*(kit.submit(session.session_id, owner=f"a{n}") for n in range(8)))
    assert sorted(s.run.ordinal for s in submitted) == list(range(1, 9))
    assert [s.run.ordinal for s in submitted if s.claim is not None] == [1]


async def test_the_same_request_id_gives_the_first_run_whatever_the_race(kit: Kit) -> None:
    session = await kit.session()
    request_id = str(uuid7())
    submitted = await asyncio.gather(
        *(kit.submit(session.session_id, owner="a", request_id=request_id) for _ in range(8))
    )
    assert len({s.run.run_id for s in submitted}) == 1
    assert len({s.created for s in submitted}) == 1
    assert sum(not s.duplicate for s in submitted) == 1
    assert sum(s.claim is not None for s in submitted) == 1
    assert (
        len((await kit.store.list_runs(kit.tenant, session.session_id, page_size=50, page_token="")).items)
        == 1
    )


async def test_a_request_id_with_another_body_is_refused(kit: Kit) -> None:
    session = await kit.session()
    await kit.submit(session.session_id, request_id="r", fingerprint=b"1")
    with pytest.raises(AlreadyExistsError) as caught:
        await kit.submit(session.session_id, request_id="r", fingerprint=b"2")
    assert caught.value.reason == "REQUEST_ID_REUSED"


async def test_a_refused_submit_does_not_use_its_request_id_up(kit: Kit) -> None:
    grant = await kit.started()
    request_id = str(uuid7())
    with pytest.raises(NotFoundError):
        await kit.submit(uuid7(), request_id=request_id)
    with pytest.raises(FailedPreconditionError):
        await kit.submit(grant.session_id, request_id=request_id, policy=ConcurrencyPolicy.REJECT)
    await kit.finish(grant, 2)
    submitted = await kit.submit(
        grant.session_id, request_id=request_id, fingerprint=b"other", policy=ConcurrencyPolicy.REJECT
    )
    assert not submitted.duplicate


async def test_request_ids_of_tenants_do_not_meet(kit: Kit) -> None:
    other = Kit(kit.store, await kit.store.ensure_key(f"o-{uuid7()}", uuid7().hex * 2, "k"), kit.pool)
    mine, theirs = await kit.session(), await other.session()
    await kit.submit(mine.session_id, request_id="same", fingerprint=b"1")
    assert not (await other.submit(theirs.session_id, request_id="same", fingerprint=b"2")).duplicate


async def test_a_session_takes_its_title_from_its_first_user_message_once(kit: Kit) -> None:
    session = await kit.session()
    await kit.submit(session.session_id, "  What\n is " + "x" * 100)
    titled = await kit.store.get_session(kit.tenant, session.session_id)
    assert titled.title == "What is " + "x" * 52
    await kit.submit(session.session_id, "Another")
    assert (await kit.store.get_session(kit.tenant, session.session_id)).title == titled.title


async def test_queued_input_joins_the_conversation_at_its_turn(kit: Kit) -> None:
    first = await kit.started("a", "first")
    second = await kit.submit(first.session_id, "second")
    assert await kit.messages(first.session_id) == [(1, "user", "first")]
    await kit.finish(first, 2, "reply to first")
    claim = await kit.claimed(second.run.run_id)
    expected = [(1, "user", "first"), (2, "assistant", "reply to first"), (3, "user", "second")]
    assert await kit.messages(first.session_id) == expected
    assert claim.context is not None
    assert [(m.ordinal, m.role, m.content) for m in claim.context.messages] == expected


async def test_reject_refuses_a_busy_session_and_takes_a_free_one(kit: Kit) -> None:
    grant = await kit.started()
    with pytest.raises(FailedPreconditionError) as caught:
        await kit.submit(grant.session_id, policy=ConcurrencyPolicy.REJECT)
    assert caught.value.reason == "SESSION_BUSY"
    assert (await kit.store.last_ordinals([grant.session_id]))[grant.session_id] == 1
    await kit.finish(grant, 2)
    assert (await kit.submit(grant.session_id, policy=ConcurrencyPolicy.REJECT)).run.ordinal == 2


async def test_interrupt_ends_what_waits_and_asks_the_holder_to_stop(kit: Kit) -> None:
    grant = await kit.started("a", "first")
    waiting = await kit.submit(grant.session_id, "second")
    third = await kit.submit(grant.session_id, "third", policy=ConcurrencyPolicy.INTERRUPT)
    assert await kit.types(waiting.run.run_id) == ["run.created", "run.cancelled"]
    assert (await kit.store.renew([ref(grant)])).cancelled == [grant.run_id]
    # The interrupted run goes on until its holder ends it, and the cancel of another did not fence it.
    assert (await kit.append(grant, 2)).outcome is AppendOutcome.COMMITTED
    await kit.step(grant, 3, event("run.cancelled", '{"reason":"x"}'), status=RunStatus.CANCELLED)
    await kit.claimed(third.run.run_id)
    expected = [(1, "user", "first"), (2, "user", "second"), (3, "user", "third")]
    assert await kit.messages(grant.session_id) == expected


async def test_interrupt_ends_a_run_whose_holder_is_gone_and_takes_its_place(kit: Kit) -> None:
    grant = await kit.started("a", "first")
    await kit.append(grant, 2)
    await kit.expire(grant.session_id)
    second = await kit.submit(grant.session_id, "second", owner="b", policy=ConcurrencyPolicy.INTERRUPT)
    assert second.claim is not None
    assert await kit.types(grant.run_id) == ["run.created", "text.delta", "run.cancelled"]
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED


async def test_rollback_takes_a_held_runs_messages_out_once_it_ends(kit: Kit) -> None:
    first = await kit.started("a", "kept")
    await kit.finish(first, 2, "kept reply")
    submitted = await kit.submit(first.session_id, "dropped", owner="a")
    assert submitted.claim is not None
    grant = submitted.claim.grant
    assert grant is not None
    third = await kit.submit(first.session_id, "instead", policy=ConcurrencyPolicy.ROLLBACK)
    await kit.step(grant, 2, event("run.cancelled", '{"reason":"x"}'), status=RunStatus.CANCELLED)
    claim = await kit.claimed(third.run.run_id)
    expected = [(1, "user", "kept"), (2, "assistant", "kept reply"), (3, "user", "instead")]
    assert await kit.messages(first.session_id) == expected
    assert (await kit.store.get_session(kit.tenant, first.session_id)).message_count == 3
    assert claim.context is not None
    assert [m.content for m in claim.context.messages] == ["kept", "kept reply", "instead"]


async def test_rollback_of_a_run_that_nobody_holds_is_done_at_once(kit: Kit) -> None:
    grant = await kit.started("a", "dropped")
    await kit.expire(grant.session_id)
    await kit.submit(grant.session_id, "instead", owner="b", policy=ConcurrencyPolicy.ROLLBACK)
    assert await kit.messages(grant.session_id) == [(1, "user", "instead")]


async def test_interrupt_abandons_a_run_that_waits_for_a_person(kit: Kit) -> None:
    grant = await kit.started()
    await kit.step(grant, 2, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    second = await kit.submit(grant.session_id, owner="b", policy=ConcurrencyPolicy.INTERRUPT)
    assert second.claim is not None
    assert (await kit.store.get_run(kit.tenant, grant.run_id)).status is RunStatus.CANCELLED


async def test_a_text_that_cannot_be_stored_is_refused_and_changes_nothing(kit: Kit) -> None:
    session = await kit.session()
    with pytest.raises(InvalidArgumentError):
        await kit.submit(session.session_id, "a\x00b", owner="a")
    assert (await kit.store.last_ordinals([session.session_id]))[session.session_id] == 0


async def test_a_mebibyte_of_input_is_taken_and_given_back_whole(kit: Kit) -> None:
    text = "é" * (512 * 1024)
    grant = await kit.started("a", text)
    assert await kit.messages(grant.session_id) == [(1, "user", text)]
    await kit.store.release(ref(grant))
    claim = await kit.claimed(grant.run_id)
    assert claim.context is not None
    assert [m.content for m in claim.context.messages] == [text]


async def test_tenants_take_turns_in_what_is_dispatched(kit: Kit) -> None:
    await kit.store.due(10_000)
    polite = Kit(
        kit.store, await kit.store.ensure_key(f"polite-{uuid7()}", uuid7().hex * 2, "test"), kit.pool
    )
    flood = [await kit.submit((await kit.session()).session_id) for _ in range(20)]
    few = [await polite.submit((await polite.session()).session_id) for _ in range(2)]
    counts = await kit.store.queued()
    assert (counts[kit.tenant], counts[polite.tenant]) == (20, 2)
    taken = set(await kit.store.due(4))
    assert {one.run.run_id for one in few} < taken
    assert {one.run.run_id for one in flood[:2]} < taken
    rest = await kit.store.due(100)
    assert {one.run.run_id for one in flood[2:]} <= set(rest)
