import asyncio
import math
from uuid import UUID

import pytest

from meshkit.errors import InvalidArgumentError, UnavailableError
from meshkit.ids import uuid7
from services.memory.domain import NewMemory, Scope, ScopeKind
from services.memory.operations.forget import forget
from services.memory.operations.list_memories import list_memories
from services.memory.operations.recall import MAX_QUERY_BYTES, Ranking, recall
from services.memory.operations.reembed import reembed
from services.memory.operations.remember import MAX_TTL_MS, remember
from services.memory.operations.sweep import BATCH, sweep_forever, sweep_once
from tests.unit.memory.fakes import FakeStore, LetterEmbedder

TENANT = UUID(int=1)
OTHER = UUID(int=2)
ANN = Scope(ScopeKind.USER, "ann")
BOB = Scope(ScopeKind.USER, "bob")
RANKING = Ranking(min_score=0.2, importance_weight=0.1)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def embedder() -> LetterEmbedder:
    return LetterEmbedder()


async def test_a_memory_is_stored_with_its_meaning(store: FakeStore, embedder: LetterEmbedder) -> None:
    memory = await remember(store, embedder, TENANT, ANN, "cat", source_session_id=UUID(int=9))
    assert (memory.text, memory.importance, memory.expire_time_ms) == ("cat", 0.5, 0)
    new = store.rows[memory.memory_id].new
    assert (new.model, new.vector) == ("letters", await embedder.embed("cat"))


@pytest.mark.parametrize(
    ("text", "more", "field"),
    [
        ("", {}, "text"),
        (" \n\t", {}, "text"),
        ("a\x00b", {}, "text"),
        ("a", {"importance": math.nan}, "importance"),
        ("a", {"importance": 1.1}, "importance"),
        ("a", {"importance": -0.1}, "importance"),
        ("a", {"ttl_ms": -1}, "ttl_ms"),
        ("a", {"ttl_ms": MAX_TTL_MS + 1}, "ttl_ms"),
        ("a", {"request_id": "\x00"}, "request_id"),
    ],
)
async def test_what_cannot_be_remembered_is_told(
    store: FakeStore, embedder: LetterEmbedder, text: str, more: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await remember(store, embedder, TENANT, ANN, text, **more)  # type: ignore[arg-type]
    assert caught.value.violations[0].field == field
    assert store.rows == {}


async def test_importance_zero_is_kept_and_not_the_default(
    store: FakeStore, embedder: LetterEmbedder
) -> None:
    assert (await remember(store, embedder, TENANT, ANN, "a", importance=0.0)).importance == 0.0


async def test_recall_has_a_default_limit_and_least_score(store: FakeStore, embedder: LetterEmbedder) -> None:
    for _ in range(7):
        await remember(store, embedder, TENANT, ANN, "cat")
    await remember(store, embedder, TENANT, ANN, "dog")
    found = await recall(store, embedder, RANKING, TENANT, ANN, "cat")
    assert [item.memory.text for item in found] == ["cat"] * 5
    everything = await recall(store, embedder, RANKING, TENANT, ANN, "cat", limit=100, min_score=-1.0)
    assert len(everything) == 8


async def test_only_the_beginning_of_a_long_query_counts(store: FakeStore, embedder: LetterEmbedder) -> None:
    await recall(store, embedder, RANKING, TENANT, ANN, "ä" * MAX_QUERY_BYTES)
    assert embedder.texts == ["ä" * (MAX_QUERY_BYTES // 2)]


async def test_an_empty_query_finds_nothing(store: FakeStore, embedder: LetterEmbedder) -> None:
    await remember(store, embedder, TENANT, ANN, "cat")
    assert await recall(store, embedder, RANKING, TENANT, ANN, "  ", min_score=-1.0) == ()


@pytest.mark.parametrize("score", [math.nan, math.inf])
async def test_a_least_score_must_be_a_number(
    store: FakeStore, embedder: LetterEmbedder, score: float
) -> None:
    with pytest.raises(InvalidArgumentError):
        await recall(store, embedder, RANKING, TENANT, ANN, "cat", min_score=score)


async def test_importance_decides_between_what_is_equally_near(
    store: FakeStore, embedder: LetterEmbedder
) -> None:
    vital = await remember(store, embedder, TENANT, ANN, "cat", importance=1.0)
    await remember(store, embedder, TENANT, ANN, "cat", importance=0.0)
    found = await recall(store, embedder, RANKING, TENANT, ANN, "cat", limit=1)
    assert [item.memory for item in found] == [vital]


async def test_pages_cover_a_scope_without_overlap(store: FakeStore, embedder: LetterEmbedder) -> None:
    kept = [await remember(store, embedder, TENANT, ANN, f"{number}") for number in range(5)]
    await remember(store, embedder, TENANT, BOB, "other")
    seen, token = [], ""
    for _ in range(3):
        page, token = await list_memories(store, TENANT, ANN, 2, token)
        seen += page
    assert seen == list(reversed(kept))
    assert token == ""


@pytest.mark.parametrize("wrong", ["tenant", "scope", "nonsense"])
async def test_a_page_token_fits_its_list_only(
    store: FakeStore, embedder: LetterEmbedder, wrong: str
) -> None:
    for _ in range(2):
        await remember(store, embedder, TENANT, ANN, "cat")
    _, token = await list_memories(store, TENANT, ANN, 1, "")
    tenant, scope = (OTHER if wrong == "tenant" else TENANT), (BOB if wrong == "scope" else ANN)
    with pytest.raises(InvalidArgumentError) as caught:
        await list_memories(store, tenant, scope, 1, "AAAA" if wrong == "nonsense" else token)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"


async def test_forget_takes_one_or_a_scope(store: FakeStore, embedder: LetterEmbedder) -> None:
    memory = await remember(store, embedder, TENANT, ANN, "cat")
    await remember(store, embedder, TENANT, ANN, "dog")
    assert await forget(store, OTHER, str(memory.memory_id), None) == 0
    assert await forget(store, TENANT, str(memory.memory_id), None) == 1
    assert await forget(store, TENANT, str(memory.memory_id), None) == 0
    assert await forget(store, TENANT, "", ANN) == 1


@pytest.mark.parametrize(("memory_id", "scope"), [("", None), (str(UUID(int=1)), ANN), ("not-an-id", None)])
async def test_forget_needs_exactly_one_good_aim(
    store: FakeStore, memory_id: str, scope: Scope | None
) -> None:
    with pytest.raises(InvalidArgumentError):
        await forget(store, TENANT, memory_id, scope)


async def test_a_sweep_removes_all_that_has_expired(store: FakeStore, embedder: LetterEmbedder) -> None:
    for _ in range(BATCH + 3):
        memory = await remember(store, embedder, TENANT, ANN, "cat", ttl_ms=60_000)
        store.expire(memory.memory_id)
    kept = await remember(store, embedder, TENANT, ANN, "cat", ttl_ms=60_000)
    assert await sweep_once(store) == BATCH + 3
    assert list(store.rows) == [kept.memory_id]


async def test_sweeping_goes_on_after_a_failure(store: FakeStore, embedder: LetterEmbedder) -> None:
    memory = await remember(store, embedder, TENANT, ANN, "cat", ttl_ms=60_000)
    store.expire(memory.memory_id)
    store.errors = [UnavailableError("DATABASE_UNAVAILABLE", "away")]
    swept = asyncio.Event()
    sweep = store.sweep

    async def watched(limit: int) -> int:
        removed = await sweep(limit)
        swept.set()
        return removed

    store.sweep = watched  # type: ignore[method-assign]
    task = asyncio.ensure_future(sweep_forever(store, 0.01))
    await asyncio.wait_for(swept.wait(), 5)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert store.rows == {}
    assert store.errors == []


async def test_a_change_of_embedder_is_made_good(store: FakeStore) -> None:
    old, now = LetterEmbedder("old"), LetterEmbedder("now")
    for number in range(450):
        await remember(store, old, TENANT if number % 2 else OTHER, ANN, "cat")
    await remember(store, now, TENANT, BOB, "dog")
    assert await recall(store, now, RANKING, TENANT, ANN, "cat") == []
    assert await reembed(store, now) == 450
    assert len(await recall(store, now, RANKING, TENANT, ANN, "cat")) == 5
    assert await reembed(store, now) == 0


def new(**more: object) -> NewMemory:
    values: dict[str, object] = {
        "memory_id": uuid7(),
        "scope": ANN,
        "text": "cat",
        "importance": 0.5,
        "ttl_ms": 0,
        "source_session_id": None,
        "request_id": "r",
        "model": "letters",
        "vector": [],
    }
    return NewMemory(**{**values, **more})  # type: ignore[arg-type]


def test_a_fingerprint_is_of_what_was_asked_and_of_nothing_else() -> None:
    assert new().fingerprint() == new(model="other", request_id="s").fingerprint()
    others = [
        new(scope=BOB),
        new(scope=Scope(ScopeKind.SESSION, "ann")),
        new(text="cat "),
        new(importance=0.4),
        new(ttl_ms=1),
        new(source_session_id=UUID(int=1)),
    ]
    assert len({new().fingerprint(), *(other.fingerprint() for other in others)}) == 7
