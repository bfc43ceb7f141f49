"""Long sessions: whether a turn begins as soon in a session of thousands of messages as in one of few."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

from bench.histogram import Times
from bench.load import Reply, load
from bench.measure import MODEL, SETTLE_SECONDS, Run, by_kind, costs, percentiles
from bench.model_script import sequence
from bench.process_cpu import usage
from bench.reading import check, first_at
from bench.scenarios import LongSessions
from bench.targets import MeshTarget

TOKENS = 20


async def measure_long_sessions(target: MeshTarget, scenario: LongSessions, model_pid: int) -> Run:
    """Fills sessions, unmeasured, and has one client ask in short and long ones in turn.

    Raises:
        IncompleteReply: A reply lacks something.
        LoadError: The load generator failed.
    """
    short = await _sessions(target, scenario.sessions, scenario.short)
    long = await _sessions(target, scenario.sessions, scenario.long)
    # One client's order: short, long, short, long, ..., and so on each turn.
    order = [session for pair in zip(short, long, strict=True) for session in pair] * scenario.turns
    asks = [target.ask(session, f"[[tokens={TOKENS}]]") for session in order]
    processes = dict(target.processes()) | {MODEL: model_pid}
    async with load([asks]) as generator:
        before = usage(processes)
        window = await generator.go()
        await asyncio.sleep(SETTLE_SECONDS)
        after = usage(processes)
        replies = await generator.replies()
    for reply in replies:
        check(target, reply, "".join(sequence(TOKENS)))
    times, figures = read(target, replies, scenario.sessions)
    parts = by_kind(before, after)
    tokens = len(replies) * TOKENS
    figures |= {"tokens": tokens, "seconds": window.seconds} | costs(parts, tokens)
    return Run(target.name, figures, parts, times)


def read(
    target: MeshTarget, replies: Sequence[Reply], sessions: int
) -> tuple[dict[str, Times], dict[str, float]]:
    """Returns times to the first token, short and long sessions apart; `first` is a session's first turn."""
    waits = [first_at(target, reply) - reply.began for reply in replies]
    apart = {"short": waits[0::2], "long": waits[1::2]}
    times = {name: Times(values) for name, values in apart.items()}
    figures = percentiles(times)
    for name, values in apart.items():
        figures[f"{name}_first_ms"] = statistics.median(values[:sessions]) / 1e6
    figures["ttft_ratio"] = statistics.median(apart["long"]) / statistics.median(apart["short"])
    return times, figures


async def _sessions(target: MeshTarget, count: int, messages: int) -> list[str]:
    made = [await target.new_session() for _ in range(count)]
    for session in made:
        await target.fill(session, messages)
        if (there := await target.message_count(session)) < messages:
            raise AssertionError(f"a session has {there} messages where {messages} were put into it")
    return made
