"""What the mesh adds over its model, in a minute: first token, tokens a second, CPU of each process.

    python -m bench.smoke [--clients 1,32] [--runs 30] [--tokens 200] [--embedded]

It starts a mesh of its own on the zero-delay model server and compares it with that server asked
directly, in the same run and on the same machine. `--embedded` uses the embedded language model and
only reports: it takes the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import uvloop
from rich.console import Console
from rich.table import Table

from bench.mesh import Mesh
from bench.process_cpu import cpu_seconds
from bench.sse_client import post_stream

GOAL_ADDED_MS = 15.0
WARM_UP_RUNS = 5
_TEXT = re.compile(rb'^data: (\{.*"type":"text\.delta".*\})$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Reply:
    """One measured reply: seconds to its first token and in all, and its number of tokens."""

    first_s: float
    total_s: float
    tokens: int


def _tokens(text: str) -> int:
    return len(text.split())


async def ask_model(url: str, prompt: str) -> Reply:
    """Asks the model server itself."""
    started = time.monotonic()
    first = 0.0
    parts: list[bytes] = []
    body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    async for chunk in post_stream(f"{url}/chat/completions", body, {}):
        parts.append(chunk.body)
        if not first and b'"content":"' in chunk.body:
            first = chunk.at - started
    total = time.monotonic() - started
    text = "".join(
        choice["delta"].get("content") or ""
        for line in b"".join(parts).split(b"\n")
        if line.startswith(b"data: {")
        for choice in json.loads(line[6:])["choices"]
    )
    return Reply(first, total, _tokens(text))


async def ask_mesh(mesh_url: str, headers: dict[str, str], session_id: str, prompt: str) -> Reply:
    """Asks through Envoy, gateway, agent and session, as a browser would."""
    started = time.monotonic()
    first = 0.0
    parts: list[bytes] = []
    url = f"{mesh_url}/v1/sessions/{session_id}/runs"
    body = {"input": prompt, "stream": True, "options": {"memory": False}}
    async for chunk in post_stream(url, body, headers):
        parts.append(chunk.body)
        if not first and b"event: text.delta" in chunk.body:
            first = chunk.at - started
    total = time.monotonic() - started
    log = b"".join(parts)
    if b"event: run.completed" not in log:
        raise SystemExit(f"a run did not complete; its log ends with: {log[-600:].decode(errors='replace')}")
    text = "".join(json.loads(line)["data"]["text"] for line in _TEXT.findall(log))
    return Reply(first, total, _tokens(text))


async def measure(
    ask: Callable[[int], Awaitable[Reply]], clients: int, runs: int
) -> tuple[list[Reply], float]:
    """Has `clients` ask at once, `runs` times in all; returns the replies and the seconds it took."""
    numbers = iter(range(runs))
    replies: list[Reply] = []

    async def client() -> None:
        for number in numbers:
            replies.append(await ask(number))

    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return replies, time.monotonic() - started


async def sessions(mesh: Mesh, count: int) -> list[str]:
    """Creates sessions to ask in."""
    async with httpx.AsyncClient(base_url=mesh.url, headers=mesh.headers, timeout=30) as client:
        made = []
        for _ in range(count):
            answer = await client.post("/v1/sessions", json={})
            answer.raise_for_status()
            made.append(answer.json()["session_id"])
        return made


def _ms(replies: list[Reply]) -> float:
    return statistics.median(reply.first_s for reply in replies) * 1000


async def compare(mesh: Mesh, console: Console, clients: int, runs: int, tokens: int) -> None:
    """Measures one number of clients against the model alone and prints both."""
    prompt = f"[[tokens={tokens}]]" if mesh.model else "Tell me about rivers."
    ids = await sessions(mesh, runs + WARM_UP_RUNS)
    headers = mesh.headers

    async def through_mesh(number: int) -> Reply:
        return await ask_mesh(mesh.url, headers, ids[number], prompt)

    for number in range(WARM_UP_RUNS):
        await ask_mesh(mesh.url, headers, ids[runs + number], prompt)
    rows = await asyncio.to_thread(mesh.status)
    before = {row.replica: cpu_seconds(row.pid) for row in rows if row.pid}
    replies, seconds = await measure(through_mesh, clients, runs)
    used = {row.replica: cpu_seconds(row.pid) - before[row.replica] for row in rows if row.pid}
    written = sum(reply.tokens for reply in replies)
    if mesh.model and written != runs * tokens:
        raise SystemExit(f"incomplete: {written} tokens came where {runs * tokens} were written")

    table = Table(title=f"{clients} client(s), {runs} runs, {written} tokens, none missing")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("first token through the mesh, p50", f"{_ms(replies):.1f} ms")
    table.add_row("tokens a second", f"{written / seconds:,.0f}")
    if mesh.model:
        url = mesh.model.url

        async def alone(_: int) -> Reply:
            return await ask_model(url, prompt)

        direct, direct_seconds = await measure(alone, clients, runs)
        added = _ms(replies) - _ms(direct)
        table.add_row("first token of the model alone, p50", f"{_ms(direct):.1f} ms")
        goal = f"  (goal <= {GOAL_ADDED_MS:.0f})" if clients == 1 else ""
        table.add_row("added by the mesh, p50", f"{added:.1f} ms{goal}")
        table.add_row("tokens a second of the model alone", f"{runs * tokens / direct_seconds:,.0f}")
    mesh_total = 0.0
    for row in sorted(rows, key=lambda row: row.replica):
        if row.pid and used[row.replica] > 0:
            cost = used[row.replica] / written * 1000
            mesh_total += 0.0 if row.service == "model" else cost
            table.add_row(f"CPU s / 1,000 tokens: {row.replica}", f"{cost:.4f}")
    table.add_row("CPU s / 1,000 tokens: the whole mesh, stores included", f"{mesh_total:.4f}")
    console.print(table)


def main() -> None:
    """Parses the arguments, starts a mesh, measures, prints, stops it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="1,32", help="numbers of clients, comma separated")
    parser.add_argument("--runs", type=int, default=40, help="runs for each number of clients, at least")
    parser.add_argument("--tokens", type=int, default=200, help="tokens a reply")
    parser.add_argument("--embedded", action="store_true", help="the embedded language model; only reports")
    arguments = parser.parse_args()
    console = Console(width=100)
    with console.status("starting a mesh"):
        mesh = Mesh(scripted_model=not arguments.embedded)
        mesh.__enter__()
    try:
        for clients in (int(text) for text in arguments.clients.split(",")):
            runs = max(arguments.runs, 4 * clients)
            uvloop.run(compare(mesh, console, clients, runs, arguments.tokens))
    finally:
        mesh.__exit__(None, None, None)


if __name__ == "__main__":
    main()
