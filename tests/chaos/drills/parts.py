"""The processes of a mesh that drills break."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.mesh import Mesh
from launcher.processes import Identity
from launcher.state import State


def process(mesh: Mesh, replica: str) -> Identity:
    """The process of a replica at this moment, as the supervisor wrote it down."""
    for child in State.load(mesh.data_dir / "state.json").children:
        if child.replica == replica:
            return child.identity
    raise LookupError(f"no {replica} runs")


async def healthy(mesh: Mesh, seconds: float = 60.0) -> None:
    """Returns once every replica is healthy."""
    await asyncio.to_thread(mesh.wait_healthy, seconds)


@contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """A folder that goes away with the block."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
