"""Tenants, sessions and messages."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from meshkit.errors import (
    AlreadyExistsError,
    HermeshError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StartupError,
)
from meshkit.ids import uuid7
from meshkit.paging import make_page_token
from services.session.domain import ActionDecision, AppendOutcome, LeaseRef
from services.session.operations.resolve import resolve
from tests.integration.session.store.kit import Kit, event


async def test_key_names_its_tenant_and_an_unknown_one_none(kit: Kit) -> None:
    key = uuid7().hex * 2
    tenant = await kit.store.ensure_key("somebody", key, "first")
    assert await kit.store.tenant_of_key(key) == tenant
    assert await kit.store.tenant_of_key("0" * 64) is None


async def test_ensuring_a_key_again_changes_nothing(kit: Kit) -> None:
    key = uuid7().hex * 2
    first = await kit.store.ensure_key("again", key, "k")
    assert await kit.store.ensure_key("again", key, "k") == first


async def test_a_key_is_never_moved_to_another_tenant_nor_brought_back(kit: Kit) -> None:
    key = uuid7().hex * 2
    await kit.store.ensure_key("one", key, "k")
    with pytest.raises(StartupError, match="another tenant"):
        await kit.store.ensure_key("two", key, "k")
    await kit.pool.execute("UPDATE session.api_key SET revoked_at = now() WHERE key_hash = $1", key)
    assert await kit.store.tenant_of_key(key) is None
    with pytest.raises(StartupError, match="revoked"):
        await kit.store.ensure_key("one", key, "k")


async def test_session_comes_back_as_it_was_made(kit: Kit) -> None:
    made = await kit.session(title="T", metadata={"a": "b", "ü": "☃"}, agent="writer", user="ann")
    assert made == await kit.store.get_session(kit.tenant, made.session_id)
    assert (made.title, made.metadata, made.agent, made.user) == ("T", {"a": "b", "ü": "☃"}, "writer", "ann")
    assert made.tenant_id == kit.tenant
    assert made.active_run_id is None
    assert made.message_count == 0


async def test_a_request_id_makes_one_session_whatever_the_race(kit: Kit) -> None:
    request_id = str(uuid7())
    made = await asyncio.gather(
        *(kit.session(title="T", request_id=request_id, fingerprint=b"f") for _ in range(8))
    )
    assert len({session.session_id for session in made}) == 1
    with pytest.raises(AlreadyExistsError) as caught:
        await kit.session(title="U", request_id=request_id, fingerprint=b"g")
    assert caught.value.reason == "REQUEST_ID_REUSED"


async def test_lists_are_last_changed_first_and_page_without_loss(kit: Kit) -> None:
    sessions = [await kit.session(title=str(n), user="ann" if n % 2 else "bob") for n in range(7)]
    # The order is by the millisecond, and by id within one.
    await asyncio.sleep(0.002)
    await kit.store.update_session(kit.tenant, sessions[0].session_id, title="changed", metadata={})
    seen, token = [], ""
    while True:
        page = await kit.store.list_sessions(kit.tenant, page_size=3, page_token=token)
        assert len(page.items) <= 3
        seen += [session.title for session in page.items]
        token = page.next_page_token
        if not token:
            break
    assert seen == ["changed", "6", "5", "4", "3", "2", "1"]
    of_ann = await kit.store.list_sessions(kit.tenant, page_size=50, page_token="", user="ann")
    assert [session.title for session in of_ann.items] == ["5", "3", "1"]
    assert of_ann.next_page_token == ""


async def test_a_page_token_of_another_list_is_refused(kit: Kit) -> None:
    for _ in range(3):
        await kit.session(user="ann")
    token = (await kit.store.list_sessions(kit.tenant, page_size=1, page_token="")).next_page_token
    for call in (
        kit.store.list_sessions(kit.tenant, page_size=1, page_token=token, user="ann"),
        kit.store.list_sessions(uuid7(), page_size=1, page_token=token),
        kit.store.list_sessions(kit.tenant, page_size=1, page_token="nonsense"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            await call
        assert caught.value.reason == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize(
    "position", ["x", "1:", "1:x", "-1:{id}", f"{2**63}:{{id}}", "9" * 400 + ":{id}", "{id}:1", ":{id}"]
)
async def test_a_forged_position_is_refused(kit: Kit, position: str) -> None:
    session = await kit.session()
    forged = position.replace("{id}", str(session.session_id))
    with pytest.raises(InvalidArgumentError) as caught:
        await kit.store.list_sessions(
            kit.tenant, page_size=1, page_token=make_page_token("ListSessions", (kit.tenant, ""), forged)
        )
    assert caught.value.reason == "PAGE_TOKEN_INVALID"
    for listing in ("ListMessages", "ListRuns"):
        call = kit.store.list_messages if listing == "ListMessages" else kit.store.list_runs
        for ordinal in ("x", "-1", str(2**31), "9" * 400):
            token = make_page_token(listing, (kit.tenant, session.session_id), ordinal)
            with pytest.raises(InvalidArgumentError) as caught:
                await call(kit.tenant, session.session_id, page_size=1, page_token=token)
            assert caught.value.reason == "PAGE_TOKEN_INVALID"


async def test_update_sets_and_removes_labels_and_keeps_the_rest(kit: Kit) -> None:
    session = await kit.session(title="T", metadata={"a": "1", "b": "2"})
    changed = await kit.store.update_session(
        kit.tenant, session.session_id, title=None, metadata={"a": "", "c": "3", "missing": ""}
    )
    assert changed.title == "T"
    assert changed.metadata == {"b": "2", "c": "3"}
    assert changed.update_time_ms >= session.update_time_ms
    emptied = await kit.store.update_session(kit.tenant, session.session_id, title="", metadata={})
    assert emptied.title == ""


async def test_deleting_a_session_removes_all_of_it_and_fences_its_writer(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2)
    await kit.store.delete_session(kit.tenant, grant.session_id)
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED
    assert (await kit.step(grant, 3, event())).outcome is AppendOutcome.FENCED
    renewal = await kit.store.renew([LeaseRef(grant.session_id, grant.run_id, grant.fence)])
    assert renewal.lost == [grant.run_id]
    assert await kit.store.heads([grant.run_id]) == {}
    assert await kit.store.last_ordinals([grant.session_id]) == {}
    for call in (
        kit.store.get_session(kit.tenant, grant.session_id),
        kit.store.get_run(kit.tenant, grant.run_id),
        kit.store.list_messages(kit.tenant, grant.session_id, page_size=1, page_token=""),
        kit.store.events_after(kit.tenant, grant.run_id, 0, 10),
        kit.store.claim(grant.run_id, "b"),
        kit.store.delete_session(kit.tenant, grant.session_id),
    ):
        with pytest.raises(NotFoundError):
            await call
    left = await kit.pool.fetchval(
        "SELECT (SELECT count(*) FROM session.event WHERE session_id = $1)"
        " + (SELECT count(*) FROM session.run WHERE session_id = $1)"
        " + (SELECT count(*) FROM session.message WHERE session_id = $1)",
        grant.session_id,
    )
    assert left == 0


async def test_a_late_repeat_of_what_was_deleted_makes_nothing_anew(kit: Kit) -> None:
    made, run = str(uuid7()), str(uuid7())
    session = await kit.session(request_id=made)
    await kit.submit(session.session_id, request_id=run)
    await kit.store.delete_session(kit.tenant, session.session_id)
    for repeat in (kit.session(request_id=made), kit.submit(session.session_id, request_id=run)):
        with pytest.raises(NotFoundError) as caught:
            await repeat
        assert caught.value.reason == "SESSION_NOT_FOUND"


async def test_deleting_while_a_writer_appends_leaves_no_event_behind(kit: Kit) -> None:
    grants = [await kit.started() for _ in range(4)]

    async def write(index: int) -> None:
        seq = 2
        while (await kit.append(grants[index], seq)).outcome is AppendOutcome.COMMITTED:
            seq += 1

    async def delete(index: int) -> None:
        while (await kit.store.heads([grants[index].run_id]))[grants[index].run_id] < 5:
            pass
        await kit.store.delete_session(kit.tenant, grants[index].session_id)

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for index in range(4):
            tasks.create_task(write(index))
            tasks.create_task(delete(index))
    ids = [grant.session_id for grant in grants]
    assert await kit.pool.fetchval("SELECT count(*) FROM session.event WHERE session_id = ANY($1)", ids) == 0


async def test_messages_page_oldest_first_and_a_history_is_the_newest_up_to_a_place(kit: Kit) -> None:
    grant = await kit.started("a", *(f"m{n}" for n in range(5)))
    seen, token = [], ""
    while True:
        page = await kit.store.list_messages(kit.tenant, grant.session_id, page_size=2, page_token=token)
        seen += [(message.ordinal, message.content) for message in page.items]
        token = page.next_page_token
        if not token:
            break
    assert seen == [(n + 1, f"m{n}") for n in range(5)]
    newest = await kit.store.history(kit.tenant, grant.session_id, 4)
    assert [message.ordinal for message in newest] == [1, 2, 3, 4]


async def test_another_tenant_finds_nothing(kit: Kit) -> None:
    grant = await kit.started()
    session_id, run_id = grant.session_id, grant.run_id
    other = await kit.store.ensure_key(f"other-{uuid7()}", uuid7().hex * 2, "k")
    foreign = Kit(kit.store, other, kit.pool)
    store = kit.store
    refused = {
        "get_session": store.get_session(other, session_id),
        "update_session": store.update_session(other, session_id, title="x", metadata={}),
        "delete_session": store.delete_session(other, session_id),
        "list_messages": store.list_messages(other, session_id, page_size=5, page_token=""),
        "submit": foreign.submit(session_id),
        "get_run": store.get_run(other, run_id),
        "list_runs": store.list_runs(other, session_id, page_size=5, page_token=""),
        "cancel": store.cancel(other, run_id, ""),
        "events_after": store.events_after(other, run_id, 0, 10),
        "resolve": resolve(store, other, run_id, "c", ActionDecision.COMPLETED, "", ""),
    }
    missing = {
        "get_session": store.get_session(other, uuid7()),
        "submit": foreign.submit(uuid7()),
        "get_run": store.get_run(other, uuid7()),
        "cancel": store.cancel(other, uuid7(), ""),
        "events_after": store.events_after(other, uuid7(), 0, 10),
    }

    async def answer(call: object) -> HermeshError:
        with pytest.raises(NotFoundError) as caught:
            await call  # type: ignore[misc]
        return caught.value

    answers = {name: await answer(call) for name, call in refused.items()}
    for name, call in missing.items():
        absent = await answer(call)
        # A foreign id looks exactly like one that does not exist.
        assert (answers[name].reason, answers[name].message) == (absent.reason, absent.message), name
    empty: UUID = other
    assert await store.history(empty, session_id, 10) == []
    assert await store.runs_from(empty, session_id, 1, 10) == []
    assert await store.waiting_calls(empty, run_id) == []
    assert (await store.list_sessions(empty, page_size=5, page_token="")).items == []
    assert (await store.get_session(kit.tenant, session_id)).title == "hello"


async def test_the_labels_of_a_session_are_bounded_however_often_some_are_added(kit: Kit) -> None:
    session = await kit.session()
    refused = set()
    for batch in range(8):
        labels = {f"{batch}-{number}": "x" * 512 for number in range(32)}
        try:
            await kit.store.update_session(kit.tenant, session.session_id, title=None, metadata=labels)
        except ResourceExhaustedError as error:
            refused.add(error.reason)
    found = await kit.store.get_session(kit.tenant, session.session_id)
    assert len(found.metadata) == 64
    assert refused == {"QUOTA_EXCEEDED"}
    # Those that are there can be changed and removed.
    changes = {"0-0": "new", "0-1": ""}
    changed = await kit.store.update_session(kit.tenant, session.session_id, title=None, metadata=changes)
    assert (len(changed.metadata), changed.metadata["0-0"]) == (63, "new")
