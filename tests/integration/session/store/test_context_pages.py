"""However much a run has stored, no answer of the store grows with it; what is read in pages is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from uuid import UUID

import orjson
import pytest

from meshkit.errors import AbortedError
from meshkit.ids import uuid7
from services.session.domain import (
    ActionDecision,
    Claim,
    EffectClass,
    Grant,
    NewMessage,
    RunContext,
    RunStatus,
    ToolCallState,
)
from services.session.store.port import CONTEXT_PAGE_BYTES, PAGE_BYTES
from services.session.store.postgres_runs import MAX_IDLE_CLAIMS
from services.session.store.rows import context_of
from tests.integration.session.store.kit import Kit, event, intent, ref

RESULT = "r" * 60_000


def data(**fields: object) -> str:
    return orjson.dumps(fields).decode()


async def call_step(kit: Kit, grant: Grant, seq: int, step: int, calls: int, *, answered: bool) -> int:
    """One step as an agent writes it: intents, results in the journal and in the log, then as messages."""
    intents = tuple(
        replace(intent(grant.run_id, place, EffectClass.PURE), call_id=f"{grant.run_id}:{step}:{place}")
        for place in range(calls)
    )
    uses = [{"call_id": one.call_id, "name": "tool", "arguments": {"a": 1}} for one in intents]
    await kit.append(
        grant, seq, event("step.started", data(step=step)), event("reasoning.delta", data(text=RESULT))
    )
    await kit.step(
        grant,
        seq + 2,
        event("message.completed", data(message_id="m", content=RESULT)),
        messages=(NewMessage(uuid7(), "assistant", "", orjson.dumps(uses).decode()),),
        intents=intents,
    )
    seq += 3
    for one in intents:
        await kit.store.begin(one.call_id, grant.session_id, grant.fence)
        await kit.store.complete(one.call_id, grant.fence, ToolCallState.COMPLETED, RESULT, "")
    for one in intents:
        told = data(call_id=one.call_id, status="completed", content=RESULT)
        await kit.append(
            grant,
            seq,
            event("tool.progress", data(call_id=one.call_id, text="p")),
            event("tool.result", told),
        )
        seq += 2
    if answered:
        messages = tuple(NewMessage(uuid7(), "tool", RESULT, "", one.call_id) for one in intents)
        await kit.step(grant, seq, event("step.started", data(step=step + 1)), messages=messages)
        seq += 1
    return seq


async def whole(kit: Kit, claim: Claim) -> tuple[RunContext, list[int]]:
    """A claim's context with all its pages, and how many bytes each answer held."""
    assert claim.context is not None
    assert claim.grant is not None
    page = whole = claim.context
    sizes = [size(page)]
    while page.next is not None:
        page = await kit.store.read_context(claim.run.run_id, claim.grant.fence, page.next)
        sizes.append(size(page))
        whole = replace(
            whole,
            messages=[*whole.messages, *page.messages],
            events=[*whole.events, *page.events],
            tool_calls=[*whole.tool_calls, *page.tool_calls],
            next=None,
        )
    return whole, sizes


def size(page: RunContext) -> int:
    return (
        sum(len(one.content) + len(one.tool_calls) for one in page.messages)
        + sum(len(one.data) for one in page.events)
        + sum(len(one.content) + len(one.arguments) for one in page.tool_calls)
    )


async def unbounded(kit: Kit, claim: Claim) -> RunContext:
    text = await kit.pool.fetchval(
        "SELECT session.run_context($1, 200, 524288, NULL)", claim.run.run_id, timeout=30
    )
    return context_of(text, claim.run)


async def test_a_run_of_many_bytes_is_claimed_in_pages_that_hold_each_result_once(kit: Kit) -> None:
    grant = await kit.started()
    seq = 2
    for step in (1, 2, 3):
        seq = await call_step(kit, grant, seq, step, 20, answered=True)
    seq = await call_step(kit, grant, seq, 4, 20, answered=False)
    await kit.expire(grant.session_id)
    claim = await kit.claimed(grant.run_id, "b")
    context, sizes = await whole(kit, claim)
    assert len(sizes) > 8
    assert max(sizes) < CONTEXT_PAGE_BYTES + len(RESULT) + 1000
    # 60 results in messages, 20 in the journal, and in no event.
    assert sum(sizes) < 81 * len(RESULT) + 100_000
    assert [len(one.content) for one in context.messages if one.role == "tool"] == [len(RESULT)] * 60
    assert [one.call_id for one in context.tool_calls] == [f"{grant.run_id}:4:{n}" for n in range(20)]
    assert {len(one.content) for one in context.tool_calls} == {len(RESULT)}
    results = [json.loads(one.data) for one in context.events if one.type == "tool.result"]
    assert results == [{"call_id": f"{grant.run_id}:4:{n}", "status": "completed"} for n in range(20)]
    assert [one.type for one in context.events[:3]] == [
        "step.started",
        "reasoning.delta",
        "message.completed",
    ]
    assert "tool.progress" not in {one.type for one in context.events}
    log = await kit.pool.fetchval(
        "SELECT sum(octet_length(data)) FROM session.event WHERE run_id = $1", grant.run_id
    )
    assert context.written_bytes == log > 80 * len(RESULT)
    plain = await unbounded(kit, claim)
    assert replace(context, written_bytes=plain.written_bytes) == plain


async def test_a_result_that_only_the_log_has_stays_in_its_event(kit: Kit) -> None:
    grant = await kit.started()
    told = data(call_id=f"{grant.run_id}:1:0", status="failed", content='there is no "tool"\\')
    odd = '{"status":"completed","call_id":"x","content":"in another order"}'
    await kit.append(
        grant, 2, event("step.started", '{"step":1}'), event("tool.result", told), event("tool.result", odd)
    )
    await kit.expire(grant.session_id)
    context = (await kit.claimed(grant.run_id, "b")).context
    assert context is not None
    assert [one.data for one in context.events] == ['{"step":1}', told, odd]


async def test_many_small_parts_are_paged_too(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2, event("step.started", '{"step":1}'), *[event() for _ in range(4500)])
    await kit.pool.execute(
        "INSERT INTO session.message (session_id, message_id, tenant_id, run_id, ordinal, role, content,"
        " tool_calls, tool_call_id, created_ms)"
        " SELECT $1, gen_random_uuid(), $2, $3, o, 'tool', '', '', '', 1"
        " FROM generate_series(2, 4500) o",
        grant.session_id,
        kit.tenant,
        grant.run_id,
    )
    await kit.expire(grant.session_id)
    claim = await kit.claimed(grant.run_id, "b")
    context, sizes = await whole(kit, claim)
    assert [one.ordinal for one in context.messages] == list(range(1, 4501))
    assert [one.seq for one in context.events] == list(range(2, 4503))
    assert len(sizes) >= 5


async def test_pages_are_for_who_holds_the_lease_also_after_a_re_attach(kit: Kit) -> None:
    grant = await kit.started("a", "x" * CONTEXT_PAGE_BYTES)
    await call_step(kit, grant, 2, 1, 10, answered=True)
    await kit.expire(grant.session_id)
    claim = await kit.claimed(grant.run_id, "b")
    assert claim.context is not None
    assert claim.grant is not None
    position = claim.context.next
    assert position is not None
    with pytest.raises(AbortedError, match="another replica"):
        await kit.store.read_context(grant.run_id, grant.fence, position)
    again = await kit.store.reattach(ref(claim.grant), "b")
    assert again is not None
    for fence in (claim.grant.fence, again.fence):
        page = await kit.store.read_context(grant.run_id, fence, position)
        assert [one.role for one in page.messages][:2] == ["assistant", "tool"]
    for fence, run_id in ((again.fence + 1, grant.run_id), (again.fence, uuid7())):
        with pytest.raises(AbortedError) as caught:
            await kit.store.read_context(run_id, fence, position)
        assert caught.value.reason == "FENCE_STALE"
    await kit.store.release(ref(again))
    with pytest.raises(AbortedError):
        await kit.store.read_context(grant.run_id, again.fence, position)


async def test_a_takeover_has_the_same_history_as_the_first_claim(kit: Kit) -> None:
    grant = await kit.started("a", "before")
    await kit.finish(grant, 2, "answered before")
    submitted = await kit.submit(grant.session_id, "now", owner="a")
    assert submitted.claim is not None
    assert submitted.claim.grant is not None
    first = submitted.claim.context
    assert first is not None
    await call_step(kit, submitted.claim.grant, 2, 1, 20, answered=True)
    await kit.expire(grant.session_id)
    context, _ = await whole(kit, await kit.claimed(submitted.run.run_id, "b"))
    assert [one.content for one in context.messages[:3]] == ["before", "answered before", "now"]
    assert context.messages[:3] == list(first.messages)
    assert context.omitted_messages == first.omitted_messages == 0


async def test_lists_of_large_things_come_in_pages_of_bounded_size(kit: Kit) -> None:
    grant = await kit.started("a", *["m" * 300_000] * 3, "small", "x" * (3 * PAGE_BYTES))
    seen, token, pages = [], "", 0
    while True:
        page = await kit.store.list_messages(kit.tenant, grant.session_id, page_size=100, page_token=token)
        pages += 1
        seen += [(one.ordinal, len(one.content)) for one in page.items]
        token = page.next_page_token
        if not token:
            break
    assert seen == [(1, 300_000), (2, 300_000), (3, 300_000), (4, 5), (5, 3 * PAGE_BYTES)]
    assert pages == 1  # the last of a page may be of any size
    await kit.step(grant, 2, event(), messages=(NewMessage(uuid7(), "assistant", "after"),))
    page = await kit.store.list_messages(kit.tenant, grant.session_id, page_size=100, page_token="")
    assert [one.ordinal for one in page.items] == [1, 2, 3, 4, 5]
    page = await kit.store.list_messages(
        kit.tenant, grant.session_id, page_size=100, page_token=page.next_page_token
    )
    assert [one.content for one in page.items] == ["after"]
    assert not page.next_page_token


async def test_events_come_in_pages_of_bounded_size(kit: Kit) -> None:
    grant = await kit.started()
    for seq in range(2, 42):
        await kit.append(grant, seq, event("tool.result", data(content=RESULT)))
    seen = 0
    while True:
        page = await kit.store.events_after(kit.tenant, grant.run_id, seen, 200)
        if not page:
            break
        assert sum(len(one.data) for one in page) < PAGE_BYTES + 2 * len(RESULT)
        assert [one.seq for one in page] == list(range(seen + 1, seen + 1 + len(page)))
        seen = page[-1].seq
    assert seen == 41


async def test_waiting_calls_come_in_pages_of_bounded_size_and_finished_ones_not_at_all(kit: Kit) -> None:
    asked: list[tuple[UUID, str]] = []
    for _ in range(3):
        grant = await kit.started()
        seq = await call_step(kit, grant, 2, 7, 3, answered=True)
        large = json.dumps({"text": "x" * (PAGE_BYTES // 3)})
        waiting = tuple(
            replace(intent(grant.run_id, n, needs_approval=True), arguments=large) for n in range(2)
        )
        await kit.step(grant, seq, event(), intents=waiting, status=RunStatus.REQUIRES_ACTION)
        asked += [(grant.run_id, one.call_id) for one in waiting]
        found = await kit.store.waiting_calls(kit.tenant, grant.run_id)
        assert [one.call_id for one in found] == [one.call_id for one in waiting]
    seen, token, pages = [], "", 0
    while True:
        page = await kit.store.pending_actions(kit.tenant, page_size=50, page_token=token)
        pages += 1
        assert sum(len(one.call.arguments) for one in page.items) < PAGE_BYTES * 1.5
        seen += [(one.call.run_id, one.call.call_id) for one in page.items]
        token = page.next_page_token
        if not token:
            break
    assert seen == asked
    assert pages == 2


async def attempt(kit: Kit, run_id: UUID, seq: int, *kinds: str) -> int:
    claim = await kit.claimed(run_id)
    assert claim.grant is not None
    await kit.append(claim.grant, seq, *[event(kind, '{"text":"x"}') for kind in kinds])
    await kit.expire(claim.grant.session_id)
    return seq + len(kinds)


@pytest.mark.parametrize(
    ("kinds", "lasts"),
    [
        (("run.started", "attempt.reset", "text.delta"), False),
        (("run.started", "attempt.reset", "reasoning.delta"), False),
        (("run.started", "tool.progress", "tool.reconciled"), False),
        # Continued and not thrown away.
        (("run.started", "text.delta"), True),
        (("run.started", "attempt.reset", "text.delta", "message.completed"), True),
        (("run.started", "tool.progress", "tool.result"), True),
    ],
)
async def test_text_that_was_thrown_away_is_no_progress(
    kit: Kit, kinds: tuple[str, ...], *, lasts: bool
) -> None:
    session = await kit.session()
    run_id = (await kit.submit(session.session_id)).run.run_id
    seq = await attempt(kit, run_id, 2, "run.started", "step.started", "text.delta")
    for _ in range(MAX_IDLE_CLAIMS):
        seq = await attempt(kit, run_id, seq, *kinds)
    claim = await kit.store.claim(run_id, "a")
    assert (claim.grant is not None) is lasts
    if not lasts:
        assert claim.run.error is not None
        assert claim.run.error.reason == "ATTEMPTS_EXHAUSTED"


async def test_an_approval_lets_a_run_of_many_bytes_go_on(kit: Kit) -> None:
    grant = await kit.started()
    seq = await call_step(kit, grant, 2, 7, 20, answered=True)
    asked = intent(grant.run_id, needs_approval=True)
    uses = data(call_id=asked.call_id, name="tool", arguments={"a": 1})
    await kit.step(
        grant,
        seq,
        event("message.completed", "{}"),
        event(
            "action.required", data(call_id=asked.call_id, kind="approval", name="tool", arguments={"a": 1})
        ),
        messages=(NewMessage(uuid7(), "assistant", "", f"[{uses}]"),),
        intents=(asked,),
        status=RunStatus.REQUIRES_ACTION,
    )
    await kit.resolve(grant.run_id, asked.call_id, ActionDecision.APPROVE)
    context, sizes = await whole(kit, await kit.claimed(grant.run_id, "b"))
    assert len(sizes) > 2
    assert max(sizes) < CONTEXT_PAGE_BYTES + len(RESULT) + 1000
    assert [(one.call_id, one.needs_approval) for one in context.tool_calls] == [(asked.call_id, False)]
    # Whether it was asked is known without what it was asked about.
    assert data(call_id=asked.call_id) in [one.data for one in context.events]
