"""The embedded embedder: wordllama's static vectors, from its wheel and without a download."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from pathlib import Path
from typing import Any

from meshkit.errors import StartupError
from services.memory import metrics
from services.memory.domain import Vector
from services.memory.embedding.port import DIMENSIONS

MODEL = "wordllama/l2_supercat_256"
# About 0.4 ms; longer texts are embedded in a thread, so that they do not hold up the event loop.
_INLINE_CHARS = 1_000
_THREADS = 2


class WordLlamaEmbedder:
    """An embedder of about 0.4 ms a sentence on one core."""

    model = MODEL

    def __init__(self, llama: Any) -> None:
        """Takes what `load` loaded."""
        self._llama = llama
        self._threads = asyncio.Semaphore(_THREADS)

    @classmethod
    async def load(cls) -> WordLlamaEmbedder:
        """Loads the model, in a quarter of a second.

        Raises:
            StartupError: The package is missing or not what it should be.
        """
        try:
            embedder = cls(await asyncio.to_thread(_load))
            vector = await embedder.embed("ready")
        except ImportError as error:
            raise StartupError("the embedder wordllama is not installed; install Hermesh again") from error
        except Exception as error:
            raise StartupError(
                f"the embedder wordllama cannot be loaded ({type(error).__name__}); install Hermesh again"
            ) from error
        if len(vector) != DIMENSIONS:
            raise StartupError(
                f"the embedder makes {len(vector)} dimensions, and the database has {DIMENSIONS}"
            )
        return embedder

    async def embed(self, text: str) -> Vector:
        """Embeds a text."""
        with metrics.EMBED_SECONDS.time():
            if len(text) <= _INLINE_CHARS:
                return self._embed(text)
            async with self._threads:
                return await asyncio.to_thread(self._embed, text)

    def _embed(self, text: str) -> Vector:
        vector: list[float] = self._llama.embed([text])[0].tolist()
        length = math.sqrt(sum(value * value for value in vector))
        if not math.isfinite(length) or length == 0.0:
            return [0.0] * DIMENSIONS
        return [value / length for value in vector]


def _load() -> Any:
    # Its tokenizer warns about threads it would start for batches; there are none here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    import wordllama

    # Importing it calls logging.basicConfig, which is not a library's to call.
    root.handlers[:] = handlers
    root.setLevel(level)
    llama = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    # Its tokenizer does not split texts into words and keeps them whole: 10,000 of them, some 30 MiB, of
    # which hardly one comes again. Not all releases of `tokenizers` let it be told so.
    resize = getattr(llama.tokenizer.model, "_resize_cache", None)
    if resize is not None:
        resize(0)
    return llama
