"""A mesh with two tool replicas and tools that wait, and a ledger of what these did that nothing kills."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.mesh import Mesh

TOOLS = """
import asyncio
import os
from pathlib import Path

from services.tool.registry import Effect, OutcomeUnknownError, tool

LEDGER = Path({ledger!r})
NOTHING = {{"type": "object"}}


def note(word, context):
    with LEDGER.open("a") as ledger:
        ledger.write(f"{{word}} {{context.call_id}} {{os.getpid()}}\\n")


@tool("wait", description="Waits.", input_schema=NOTHING, effect=Effect.NON_IDEMPOTENT, timeout=60.0)
async def wait(arguments, context):
    note("began", context)
    try:
        await asyncio.sleep(50)
    except asyncio.CancelledError:
        note("stopped", context)
        raise


@tool("stubborn", description="Goes on.", input_schema=NOTHING, effect=Effect.NON_IDEMPOTENT, timeout=60.0)
async def stubborn(arguments, context):
    note("began", context)
    ends = asyncio.get_running_loop().time() + 12
    while (left := ends - asyncio.get_running_loop().time()) > 0:
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            note("told", context)
    note("acted", context)


@tool("lose", description="Loses the answer.", input_schema=NOTHING, effect=Effect.NON_IDEMPOTENT)
async def lose(arguments, context):
    raise OutcomeUnknownError("no answer came")
"""


@dataclass(frozen=True)
class Deed:
    """A line of the ledger."""

    word: str
    call_id: str
    pid: int


@dataclass
class ToolsMesh:
    """The mesh and its ledger."""

    mesh: Mesh
    ledger: Path

    def deeds(self, run_id: str) -> list[Deed]:
        """What the run's calls did."""
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        found = [Deed(word, call_id, int(pid)) for word, call_id, pid in map(str.split, lines)]
        return [deed for deed in found if deed.call_id.startswith(run_id)]

    def words(self, run_id: str) -> list[str]:
        """The same without who and where."""
        return [deed.word for deed in self.deeds(run_id)]

    async def did(self, run_id: str, *words: str, seconds: float = 10.0) -> float:
        """Waits until the run's calls have done just this; returns how many seconds that took."""
        began = time.monotonic()
        while (done := self.words(run_id)) != list(words):
            assert time.monotonic() - began < seconds, f"the tools did {done} and not {words}"
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def model_streams(self) -> tuple[int, int]:
        """How many replies the model is writing, and how many were given up by their reader."""
        assert self.mesh.model is not None
        async with httpx.AsyncClient() as client:
            stats = (await client.get(self.mesh.model.url.removesuffix("/v1") + "/stats")).json()
        return stats["open"], stats["aborted"]

    async def model_is_idle(self, seconds: float) -> None:
        """Waits until the model writes nothing."""
        began = time.monotonic()
        while (await self.model_streams())[0]:
            assert time.monotonic() - began < seconds, "the model still writes"
            await asyncio.sleep(0.05)

    async def model_gave_up(self, before: int, seconds: float) -> float:
        """Waits until one more reply was given up than `before`; returns the seconds."""
        began = time.monotonic()
        while (await self.model_streams())[1] <= before:
            assert time.monotonic() - began < seconds, "the model's stream was not closed"
            await asyncio.sleep(0.02)
        return time.monotonic() - began


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Stops processes for the time of the block, as a machine does that hangs; some may die meanwhile."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def tools_mesh(folder: Path, **settings: str) -> Iterator[ToolsMesh]:
    """Starts one for the time of the block."""
    ledger = folder / "ledger"
    (folder / "waiting_tools.py").write_text(TOOLS.format(ledger=str(ledger)))
    values = {"HERMESH_TOOL_MODULES": "waiting_tools", "PYTHONPATH": str(folder)} | settings
    with Mesh(replicas="gateway=2,agent=2,session=2,tool=2,memory=1", settings=values) as mesh:
        yield ToolsMesh(mesh, ledger)
