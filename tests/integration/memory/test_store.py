"""What every store keeps to."""

import asyncio
import math
from uuid import UUID

import pytest

from meshkit.errors import AlreadyExistsError, ResourceExhaustedError
from meshkit.ids import uuid7
from services.memory.domain import NewMemory, Query, Scope, ScopeKind, Vector
from services.memory.embedding.port import DIMENSIONS
from services.memory.store.port import Store
from tests.integration.memory.conftest import MAX_PER_SCOPE

TENANT, OTHER = uuid7(), uuid7()
ANN = Scope(ScopeKind.USER, "ann")
BOB = Scope(ScopeKind.USER, "bob")
SESSION = Scope(ScopeKind.SESSION, "ann")
FOREVER_MS = 100 * 366 * 24 * 3600 * 1000


def vector(angle: float) -> Vector:
    """A unit vector whose cosine with `vector(0)` is that of the angle."""
    return [math.cos(angle), math.sin(angle), *[0.0] * (DIMENSIONS - 2)]


def new(
    text: str = "cat",
    *,
    scope: Scope = ANN,
    importance: float = 0.5,
    ttl_ms: int = 0,
    request_id: str = "",
    model: str = "m",
    angle: float = 0.0,
    source: UUID | None = None,
) -> NewMemory:
    return NewMemory(uuid7(), scope, text, importance, ttl_ms, source, request_id, model, vector(angle))


def query(angle: float = 0.0, *, limit: int = 10, min_score: float = -1.0, model: str = "m") -> Query:
    return Query(model, vector(angle), limit, min_score, importance_weight=0.1)


async def texts(store: Store, tenant: UUID, scope: Scope, wanted: Query) -> list[str]:
    return [item.memory.text for item in await store.recall(tenant, scope, wanted)]


async def test_a_memory_comes_back_as_it_was(store: Store) -> None:
    source = uuid7()
    asked = new("häßlich 🦆\n", importance=0.75, ttl_ms=3_600_000, source=source)
    memory = await store.remember(TENANT, asked)
    assert (memory.memory_id, memory.scope, memory.text) == (asked.memory_id, ANN, "häßlich 🦆\n")
    assert (memory.importance, memory.source_session_id) == (0.75, source)
    assert memory.expire_time_ms - memory.create_time_ms == pytest.approx(3_600_000, abs=1000)
    assert await store.list_memories(TENANT, ANN, None, 5) == [memory]
    (found,) = await store.recall(TENANT, ANN, query())
    assert (found.memory, found.score) == (memory, pytest.approx(1.0))


async def test_the_longest_life_can_be_stored(store: Store) -> None:
    memory = await store.remember(TENANT, new(ttl_ms=FOREVER_MS))
    assert memory.expire_time_ms > memory.create_time_ms


async def test_the_nearest_come_first(store: Store) -> None:
    for name, angle in (("far", 1.2), ("near", 0.1), ("middle", 0.6)):
        await store.remember(TENANT, new(name, angle=angle))
    found = await store.recall(TENANT, ANN, query(limit=2))
    assert [item.memory.text for item in found] == ["near", "middle"]
    assert [item.score for item in found] == pytest.approx([math.cos(0.1), math.cos(0.6)], abs=1e-6)


async def test_importance_counts_a_little(store: Store) -> None:
    await store.remember(TENANT, new("trivial", angle=0.30, importance=0.0))
    await store.remember(TENANT, new("vital", angle=0.35, importance=1.0))
    await store.remember(TENANT, new("vital but far", angle=1.0, importance=1.0))
    assert await texts(store, TENANT, ANN, query()) == ["vital", "trivial", "vital but far"]


async def test_what_is_too_far_is_left_out(store: Store) -> None:
    await store.remember(TENANT, new("near", angle=0.1))
    await store.remember(TENANT, new("opposite", angle=math.pi))
    assert await texts(store, TENANT, ANN, query(min_score=0.5)) == ["near"]


async def test_memories_never_cross_a_scope_or_a_tenant(store: Store) -> None:
    await store.remember(TENANT, new("ann's"))
    await store.remember(TENANT, new("bob's", scope=BOB))
    await store.remember(TENANT, new("the session's", scope=SESSION))
    await store.remember(OTHER, new("another ann's"))
    for tenant, scope, text in (
        (TENANT, ANN, "ann's"),
        (TENANT, BOB, "bob's"),
        (TENANT, SESSION, "the session's"),
        (OTHER, ANN, "another ann's"),
    ):
        assert await texts(store, tenant, scope, query()) == [text]
        assert [memory.text for memory in await store.list_memories(tenant, scope, None, 9)] == [text]
    assert await texts(store, OTHER, BOB, query()) == []


async def test_vectors_of_two_embedders_are_not_compared(store: Store) -> None:
    await store.remember(TENANT, new("old", model="old"))
    await store.remember(TENANT, new("now", model="now"))
    assert await texts(store, TENANT, ANN, query(model="now")) == ["now"]


async def test_vectors_can_be_replaced_by_another_embedders(store: Store) -> None:
    first = await store.remember(TENANT, new("first", model="old", angle=1.0))
    second = await store.remember(OTHER, new("second", model="old"))
    await store.remember(TENANT, new("third", model="now"))
    assert await store.other_models("now", None, 9) == [
        (first.memory_id, "first"),
        (second.memory_id, "second"),
    ]
    assert await store.other_models("now", first.memory_id, 9) == [(second.memory_id, "second")]
    assert await store.other_models("now", None, 1) == [(first.memory_id, "first")]
    assert not await store.set_vector(first.memory_id, "another text", "now", vector(0.0))
    assert not await store.set_vector(uuid7(), "first", "now", vector(0.0))
    assert await store.set_vector(first.memory_id, "first", "now", vector(0.0))
    (found, _) = sorted(
        await store.recall(TENANT, ANN, query(model="now")), key=lambda item: item.memory.text
    )
    assert (found.memory, found.score) == (first, pytest.approx(1.0))


async def test_a_vector_of_zeros_is_near_to_nothing(store: Store) -> None:
    await store.remember(TENANT, new())
    zeros = Query("m", [0.0] * DIMENSIONS, 5, -1.0, 0.1)
    assert [item.score for item in await store.recall(TENANT, ANN, zeros)] == [0.0]


async def test_a_repeated_request_returns_the_first_memory(store: Store) -> None:
    first = await store.remember(TENANT, new(request_id="r", ttl_ms=60_000))
    assert await store.remember(TENANT, new(request_id="r", ttl_ms=60_000)) == first
    assert len(await store.list_memories(TENANT, ANN, None, 9)) == 1


async def test_repeated_requests_at_once_store_one(store: Store) -> None:
    stored = await asyncio.gather(*(store.remember(TENANT, new(request_id="r")) for _ in range(8)))
    assert len({memory.memory_id for memory in stored}) == 1


async def test_a_request_id_is_for_one_request_of_one_tenant(store: Store) -> None:
    await store.remember(TENANT, new(request_id="r"))
    with pytest.raises(AlreadyExistsError) as caught:
        await store.remember(TENANT, new("dog", request_id="r"))
    assert caught.value.reason == "REQUEST_ID_REUSED"
    assert (await store.remember(OTHER, new("dog", request_id="r"))).text == "dog"


async def test_a_forgotten_memory_may_be_remembered_again(store: Store) -> None:
    first = await store.remember(TENANT, new(request_id="r"))
    await store.forget(TENANT, first.memory_id)
    assert (await store.remember(TENANT, new(request_id="r"))).memory_id != first.memory_id


async def test_a_full_scope_refuses_and_leaves_others_alone(store: Store) -> None:
    for number in range(MAX_PER_SCOPE):
        await store.remember(TENANT, new(request_id=f"{number}"))
    with pytest.raises(ResourceExhaustedError) as caught:
        await store.remember(TENANT, new(request_id="more"))
    assert caught.value.reason == "QUOTA_EXCEEDED"
    await store.remember(TENANT, new(request_id="0"))
    await store.remember(TENANT, new(scope=BOB))
    await store.forget_scope(TENANT, ANN)
    await store.remember(TENANT, new())


async def test_forgetting_is_scoped(store: Store) -> None:
    memory = await store.remember(TENANT, new())
    await store.remember(TENANT, new(scope=BOB))
    assert await store.forget(OTHER, memory.memory_id) == 0
    assert await store.forget(TENANT, uuid7()) == 0
    assert await store.forget_scope(OTHER, ANN) == 0
    assert await store.forget_scope(TENANT, SESSION) == 0
    assert await store.forget(TENANT, memory.memory_id) == 1
    assert await store.forget_scope(TENANT, BOB) == 1


async def test_lists_are_newest_first_and_go_on_where_they_ended(store: Store) -> None:
    kept = [await store.remember(TENANT, new(f"{number}")) for number in range(5)]
    first = await store.list_memories(TENANT, ANN, None, 3)
    rest = await store.list_memories(TENANT, ANN, first[-1].memory_id, 3)
    assert [*first, *rest] == list(reversed(kept))


async def test_what_has_expired_is_not_seen_and_is_swept(store: Store) -> None:
    for _ in range(3):
        await store.remember(TENANT, new("gone", ttl_ms=1))
    await store.remember(OTHER, new("gone", ttl_ms=1))
    await store.remember(TENANT, new("kept", ttl_ms=3_600_000))
    await asyncio.sleep(0.01)  # the time that the store measures, not a wait for a task
    assert await texts(store, TENANT, ANN, query()) == ["kept"]
    assert [memory.text for memory in await store.list_memories(TENANT, ANN, None, 9)] == ["kept"]
    assert await store.sweep(3) == 3
    assert await store.sweep(3) == 1
    assert await store.sweep(3) == 0
    assert await texts(store, TENANT, ANN, query()) == ["kept"]


async def test_preferences_are_merged_and_removed(store: Store) -> None:
    assert await store.get_preferences(TENANT, "ann") == {}
    assert await store.set_preferences(TENANT, "ann", {"a": "1", "none": ""}) == {"a": "1"}
    assert await store.set_preferences(TENANT, "ann", {"b": "2", "ü 🦆": "'\"\\"}) == {
        "a": "1",
        "b": "2",
        "ü 🦆": "'\"\\",
    }
    assert await store.set_preferences(TENANT, "ann", {"a": "", "b": "null"}) == {
        "b": "null",
        "ü 🦆": "'\"\\",
    }
    assert await store.get_preferences(TENANT, "bob") == {}
    assert await store.get_preferences(OTHER, "ann") == {}


async def test_preferences_have_a_bound(store: Store) -> None:
    for start in range(0, 256, 64):
        await store.set_preferences(TENANT, "ann", {str(number): "x" for number in range(start, start + 64)})
    with pytest.raises(ResourceExhaustedError) as caught:
        await store.set_preferences(TENANT, "ann", {"one more": "x"})
    assert caught.value.reason == "QUOTA_EXCEEDED"
    assert len(await store.set_preferences(TENANT, "ann", {"one more": "x", "0": ""})) == 256


async def test_changes_at_once_lose_nothing(store: Store) -> None:
    await asyncio.gather(
        *(
            store.set_preferences(TENANT, "ann", {f"{number}": "x", "same": f"{number}"})
            for number in range(20)
        )
    )
    assert len(await store.get_preferences(TENANT, "ann")) == 21
