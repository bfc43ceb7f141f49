"""What reading a model's stream costs: the openai package, httpx with a few lines, the agent's own reader.

    python -m bench.reader_cost [--streams 32] [--seconds 5]

The zero-delay model server is a process of its own, all readers run here, turn about. CPU microseconds a
token, the median of three; every reply is checked.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import orjson
import uvloop
from rich.table import Table

from bench.command import new_console
from bench.gateway_cost import parse
from bench.mesh import ModelServer
from bench.model_script import sequence
from services.agent.model.openai import OpenAIModel
from services.agent.model.port import ChatMessage, ModelRequest, TextDelta

TRIES = 3
MODEL = "scripted"
Reader = Callable[[str], Awaitable[str]]


class Load(NamedTuple):
    """`tokens` a reply at `rate` a second (0 = as fast as it goes), read by `streams` at once."""

    name: str
    streams: int
    tokens: int
    rate: int

    @property
    def prompt(self) -> str:
        """What makes the model server do it."""
        return f"[[tokens={self.tokens} rate={self.rate}]]"


@asynccontextmanager
async def readers(url: str) -> AsyncGenerator[Mapping[str, Reader], None]:
    """Yields ways to ask the model and return the whole reply."""
    async with AsyncExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        plain = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=60, limits=limits))
        package = await stack.enter_async_context(
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        )
        own = OpenAIModel(url)
        stack.push_async_callback(own.aclose)

        async def by_package(prompt: str) -> str:
            stream = await package.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": prompt}], stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        async def by_httpx(prompt: str) -> str:
            body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": True}
            parts: list[str] = []
            async with plain.stream("POST", f"{url}/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        for choice in orjson.loads(line[6:])["choices"]:
                            parts.append(choice["delta"].get("content") or "")
            return "".join(parts)

        async def by_ours(prompt: str) -> str:
            request = ModelRequest(MODEL, [ChatMessage("user", prompt)])
            parts: list[str] = []
            async for batch in own.stream(request):
                parts += [event.text for event in batch if isinstance(event, TextDelta)]
            return "".join(parts)

        yield {"openai package": by_package, "httpx and orjson": by_httpx, "the agent's own": by_ours}


async def cost(read: Reader, load: Load) -> float:
    """Returns CPU microseconds a token of this process."""
    began = time.process_time()
    replies = await asyncio.gather(*(read(load.prompt) for _ in range(load.streams)))
    used = time.process_time() - began
    if set(replies) != {"".join(sequence(load.tokens))}:
        raise SystemExit("a reply is not whole")
    return used / (load.streams * load.tokens) * 1e6


async def run(streams: int, seconds: float) -> None:
    """Measures all readers under each load, and prints a table."""
    loads = (
        Load(f"{streams} streams of 50 tokens/s", streams, max(1, round(seconds * 50)), 50),
        Load("8 streams as fast as they go", 8, 2_000, 0),
    )
    table = Table(title="CPU of the reader, microseconds a token", title_justify="left")
    table.add_column("reader")
    for load in loads:
        table.add_column(load.name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        model = ModelServer.start(Path(folder))
        try:
            async with readers(model.url) as ways:
                costs: dict[tuple[str, Load], list[float]] = {}
                for _ in range(TRIES):
                    for load in loads:
                        for name, read in ways.items():
                            costs.setdefault((name, load), []).append(await cost(read, load))
                for name in ways:
                    table.add_row(name, *(f"{statistics.median(costs[name, load]):.1f}" for load in loads))
        finally:
            model.stop()
    new_console().print(table)


def main() -> None:
    """Parses the arguments and measures."""
    options = parse(__doc__)
    uvloop.run(run(options.streams, options.seconds))


if __name__ == "__main__":
    main()
