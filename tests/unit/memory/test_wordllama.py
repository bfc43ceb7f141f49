import asyncio
import logging
import math
import os
from pathlib import Path

import pytest

from services.memory.embedding.port import DIMENSIONS
from services.memory.embedding.wordllama import WordLlamaEmbedder


@pytest.fixture(scope="module")
def loaded() -> WordLlamaEmbedder:
    return asyncio.run(WordLlamaEmbedder.load())


@pytest.fixture
def embedder(loaded: WordLlamaEmbedder) -> WordLlamaEmbedder:
    # A semaphore belongs to the loop that first waits on it; each test has its own.
    return WordLlamaEmbedder(loaded._llama)


def cosine(a: object, b: object) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))  # type: ignore[call-overload]


@pytest.mark.parametrize("text", ["hello", " ", "\x00", "🦆" * 10, "x " * 8192, "漢字", "\ud7ff"])
async def test_any_text_has_a_vector_of_length_one(embedder: WordLlamaEmbedder, text: str) -> None:
    vector = await embedder.embed(text)
    assert len(vector) == DIMENSIONS
    assert math.sqrt(sum(value * value for value in vector)) == pytest.approx(1.0)


async def test_a_text_without_meaning_is_zeros(embedder: WordLlamaEmbedder) -> None:
    assert list(await embedder.embed("")) == [0.0] * DIMENSIONS


async def test_nearness_is_nearness_in_meaning(embedder: WordLlamaEmbedder) -> None:
    query = await embedder.embed("What pet do I have?")
    dog = await embedder.embed("My dog is called Biscuit.")
    others = [await embedder.embed(text) for text in ("I live in Lisbon.", "I prefer short answers.")]
    assert cosine(query, dog) > 0.2 > max(cosine(query, other) for other in others)


async def test_the_same_text_has_the_same_vector_side_by_side(embedder: WordLlamaEmbedder) -> None:
    long = "My dog is called Biscuit. " * 100
    first, *others = await asyncio.gather(*(embedder.embed(long) for _ in range(8)))
    assert all(list(other) == list(first) for other in others)


async def test_texts_that_were_embedded_are_not_kept(embedder: WordLlamaEmbedder) -> None:
    def resident() -> float:
        """Memory in MiB."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    await embedder.embed("warm")
    before = resident()
    for number in range(3000):
        await embedder.embed(f"message {number} of a user: {number * 7919} words on {number * 104729} things")
    assert resident() - before < 4


async def test_loading_leaves_logging_as_it_was() -> None:
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    await WordLlamaEmbedder.load()
    assert (root.level, root.handlers[:]) == before
