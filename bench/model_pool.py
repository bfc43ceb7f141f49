"""Two model servers behind the mesh: what keeping a session on one of them is worth.

    python -m bench.model_pool [--rounds 3] [--sessions 8] [--turns 5] [--clients 4] [--write]

For each way to balance it starts two of the embedded llama.cpp servers and a mesh over both. A few clients
ask in several sessions, turn after turn, so that the history grows; each server keeps as many prompts as it
has slots. What is read are the prompt's tokens that came from the cache, as the model counts them, and the
time to the first token from a session's second turn on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import uvloop
from rich.table import Table

from bench.command import new_console, whole
from bench.facts import ROOT, facts
from bench.mesh import Mesh, MeshError, wait_until
from bench.report import ReportError, machine, table, write_section
from bench.results import Spread
from bench.sse_client import BadAnswer, post_stream
from launcher.model import INSTRUCTIONS, NAME, SLOTS, TOKENS_A_SLOT

BALANCES = ("agent", "least_request", "session")
SERVERS = 2
START_SECONDS = 60.0
REPLY_TOKENS = 16
SEED = 1
# About a hundred tokens a turn, so that a history is worth keeping.
QUESTION = (
    "This is note {turn} of traveller {session}: in the morning we walked along river number {turn}, which "
    "is {length} kilometres long, crossed {bridges} bridges, met {people} people and counted {birds} birds; "
    "in the evening we stayed in village number {village}, where it rained. What did we do?"
)
RESULTS = ROOT / "bench" / "results" / "model_pool.json"
PAGE = ROOT / "docs" / "model-pool.md"
SECTION = "model_pool"
_USAGE = re.compile(rb'^data: (\{.*"type":"usage".*\})$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: its number from 0, milliseconds to its first token, tokens of its prompt and those cached."""

    number: int
    first_ms: float
    prompt: int
    cached: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way to balance came to, from the second turn on."""

    balance: str
    turns: int
    first_p50_ms: float
    first_p90_ms: float
    prompt: int
    cached: int
    seconds: float

    @property
    def share(self) -> float:
        """The part of the prompts' tokens that came from a cache."""
        return self.cached / self.prompt if self.prompt else 0.0


@contextmanager
def model_server(folder: Path, number: int, key: str) -> Iterator[str]:
    """Runs an embedded model server; yields its base URL. Raises MeshError when it does not start."""
    ready = folder / f"model-{number}.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.model", "--ready-file", str(ready)],
        env=os.environ | {"HERMESH_LLM_API_KEY": key},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, START_SECONDS, "a model server")
        if not ready.exists():
            raise MeshError("a model server ended at once; python -m launcher.model says why")
        yield f"http://{json.loads(ready.read_text())['address']}/v1"
    finally:
        process.terminate()
        process.wait(timeout=20)


def settings(urls: Sequence[str], key: str, balance: str) -> dict[str, str]:
    """Returns a mesh's settings."""
    return {
        "HERMESH_LLM_BASE_URL": ",".join(urls),
        "HERMESH_LLM_API_KEY": key,
        "HERMESH_LLM_MODEL": NAME,
        "HERMESH_LLM_TOOL_MODE": "none",
        "HERMESH_LLM_CONTEXT_TOKENS": str(TOKENS_A_SLOT),
        "HERMESH_INSTRUCTIONS": INSTRUCTIONS,
        "HERMESH_MODEL_BALANCE": balance,
    }


def question(session: int, turn: int) -> str:
    """Returns what is said in a turn; no two of them are the same."""
    number = session * 100 + turn
    return QUESTION.format(
        turn=number,
        session=session,
        length=7 * number % 90 + 11,
        bridges=3 * number % 17 + 2,
        people=5 * number % 71 + 3,
        birds=11 * number % 83 + 4,
        village=13 * number % 97,
    )


def read_usage(log: bytes) -> tuple[int, int]:
    """Returns a run's prompt tokens and those of them that were cached. Raises BadAnswer without them."""
    found = _USAGE.search(log)
    if found is None or b"event: run.completed" not in log:
        raise BadAnswer(f"a run has no usage or did not complete: {log[-600:].decode(errors='replace')}")
    data: Mapping[str, Any] = orjson.loads(found[1])["data"]
    return int(data["input_tokens"]), int(data.get("cached_tokens") or 0)


async def ask(mesh: Mesh, session_id: str, text: str, number: int) -> Turn:
    """Asks one question."""
    body = {
        "input": text,
        "stream": True,
        "options": {"memory": False, "max_output_tokens": REPLY_TOKENS},
    }
    began, first, parts = time.monotonic(), 0.0, []
    async for chunk in post_stream(f"{mesh.url}/v1/sessions/{session_id}/runs", body, mesh.headers):
        parts.append(chunk.body)
        if not first and b"event: text.delta" in chunk.body:
            first = chunk.at - began
    prompt, cached = read_usage(b"".join(parts))
    return Turn(number, first * 1000, prompt, cached)


async def converse(mesh: Mesh, sessions: int, turns: int, clients: int) -> list[Turn]:
    """Has clients ask turn after turn of all sessions, each time in another order.

    Whoever has an answer asks for a session that chance picks: a client that stayed with its own would come
    back to the server that it has just left idle, and find its cache there without any affinity.
    """
    async with httpx.AsyncClient(base_url=mesh.url, headers=mesh.headers, trust_env=False) as client:
        ids = [(await client.post("/v1/sessions", json={})).json()["session_id"] for _ in range(sessions)]
    done: list[Turn] = []
    left = iter(plan(sessions, turns))
    # A session's turn begins when the one before is over.
    busy = [asyncio.Lock() for _ in ids]

    async def one() -> None:
        for session, turn in left:
            async with busy[session]:
                done.append(await ask(mesh, ids[session], question(session, turn), turn))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
    return done


def plan(sessions: int, turns: int) -> list[tuple[int, int]]:
    """Returns each session and turn, the sessions of a turn in an order of its own; always the same."""
    rng = random.Random(SEED)
    return [(session, turn) for turn in range(turns) for session in rng.sample(range(sessions), sessions)]


def summed(balance: str, turns: Sequence[Turn], seconds: float) -> Outcome:
    """Returns what the turns came to; a session's first one has nothing to find."""
    later = [turn for turn in turns if turn.number]
    waits = sorted(turn.first_ms for turn in later)
    return Outcome(
        balance,
        len(later),
        statistics.median(waits),
        waits[len(waits) * 9 // 10],
        sum(turn.prompt for turn in later),
        sum(turn.cached for turn in later),
        seconds,
    )


COLUMNS = (
    "HERMESH_MODEL_BALANCE",
    "turns",
    "prompt tokens",
    "cached",
    "first token p50 ms",
    "p90 ms",
    "seconds",
)


def cells(rounds: Sequence[Outcome]) -> list[str]:
    """Returns what the rounds of one way came to as a table's row."""
    return [
        rounds[0].balance,
        f"{sum(one.turns for one in rounds)}",
        f"{sum(one.prompt for one in rounds):,}",
        Spread.of([one.share for one in rounds]).shown(".0%"),
        Spread.of([one.first_p50_ms for one in rounds]).shown(".0f"),
        Spread.of([one.first_p90_ms for one in rounds]).shown(".0f"),
        Spread.of([one.seconds for one in rounds]).shown(".0f"),
    ]


def section(found: Mapping[str, Any], outcomes: Sequence[Sequence[Outcome]]) -> str:
    """Returns the page's section."""
    about = (
        f"{SERVERS} servers of {SLOTS} slots each, {found['sessions']} sessions of {found['turns']} turns, "
        f"{found['clients']} clients at once; from each session's second turn on. "
        f"Least, median and most of {len(outcomes[0])} rounds."
    )
    return "\n\n".join(
        [about, table(COLUMNS, [cells(rounds) for rounds in outcomes]), machine(found["facts"])]
    )


def write(found: Mapping[str, Any], outcomes: Sequence[Sequence[Outcome]]) -> None:
    """Writes the results and the page. Raises ReportError."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    document = dict(found) | {"outcomes": [[asdict(one) for one in rounds] for rounds in outcomes]}
    RESULTS.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
    write_section(PAGE, SECTION, section(found, outcomes))


def measure(balance: str, options: argparse.Namespace) -> Outcome:
    """Measures one way once, on new servers: nothing of what came before is in their caches."""
    key = secrets.token_urlsafe(16)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hermesh-pool-")))
        urls = [stack.enter_context(model_server(folder, number, key)) for number in range(SERVERS)]
        mesh = stack.enter_context(Mesh(settings=settings(urls, key, balance), scripted_model=False))
        began = time.monotonic()
        turns = uvloop.run(converse(mesh, options.sessions, options.turns, options.clients))
        return summed(balance, turns, time.monotonic() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="bench.model_pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=whole(1), default=3, help="how often each way is measured, in turn")
    parser.add_argument("--sessions", type=whole(1), default=8)
    parser.add_argument("--turns", type=whole(2), default=5)
    parser.add_argument("--clients", type=whole(1), default=4)
    parser.add_argument("--write", action="store_true", help="write bench/results and docs/model-pool.md")
    options = parser.parse_args(arguments)
    console = new_console()
    found = {"facts": facts()} | {name: getattr(options, name) for name in ("sessions", "turns", "clients")}
    shown = Table(title="from each session's second turn on")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    outcomes: list[list[Outcome]] = [[] for _ in BALANCES]
    try:
        for _ in range(options.rounds):
            for rounds, balance in zip(outcomes, BALANCES, strict=True):
                rounds.append(measure(balance, options))
        for rounds in outcomes:
            shown.add_row(*cells(rounds))
        if options.write:
            write(found, outcomes)
    except (BadAnswer, MeshError, ReportError) as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    console.print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
