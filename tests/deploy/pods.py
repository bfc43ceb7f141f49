"""What tests of pods share: servers beside them on their node, and waiting."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from tests.deploy.kubelet import Node

START_SECONDS = 120.0


@contextlib.contextmanager
def on_node(node: Node, folder: Path, name: str, command: list[str]) -> Iterator[None]:
    """A server on the node, beside the pods."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(node.command(*command), stdout=log, stderr=log, cwd="/")
    try:
        yield
    finally:
        process.kill()
        process.wait(timeout=30)


async def until(happened: Callable[[], bool]) -> None:
    """Waits until something is so."""
    async with asyncio.timeout(START_SECONDS):
        while not happened():
            await asyncio.sleep(0.05)


async def serves(url: str) -> None:
    """Waits until an Envoy has found a gateway, and that one everything behind it."""
    async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(timeout=5) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await client.get(f"{url}/ready")
                if answer.status_code == 200 and answer.json()["status"] == "ready":
                    return
            await asyncio.sleep(0.2)
