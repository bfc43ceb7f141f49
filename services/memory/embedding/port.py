"""The port of an embedder."""

from __future__ import annotations

from typing import Protocol

from services.memory.domain import Vector

# The column's type is vector(256): another number of dimensions is a migration.
DIMENSIONS = 256


class Embedder(Protocol):
    """Turns texts into vectors whose nearness is nearness in meaning."""

    @property
    def model(self) -> str:
        """Names what makes the vectors; it changes whenever they would."""
        ...

    async def embed(self, text: str) -> Vector:
        """Returns a vector of `DIMENSIONS` floats and length 1, or of zeros for a text without meaning."""
        ...
