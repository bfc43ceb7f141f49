"""What clients ask for, drawn from a seed: texts that steer the scripted model and the ledger's tools."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.traffic.transport import POLICIES

# What share of runs is asked to be cancelled, and of streams cut by their client.
CANCELLED = 0.08
CUT = 0.35
# What share of messages is followed by others before the first is answered.
CROWDED = 0.25
_SUM = "<sum>"
# Less than what goes to the object store, and as many as a model may call side by side.
_PAGE_CHARACTERS = 60_000
_SIDE_BY_SIDE = 60
_LARGE_WORDS = 60


@dataclass(frozen=True, slots=True)
class Work:
    """One message.

    Attributes:
        text: what is said.
        words: how many words the reply has if it is the scripted one; 0 where something else decides.
        policy: for a session that is busy.
        cancel_after: cancel once so many events came; 0 never.
        stream: whether it is submitted and streamed by one call.
        sum: a number as the model writes it into each call's arguments; readers must see it unchanged.
        calls: how many calls the run makes; 0 where that is not known.
    """

    text: str
    words: int
    policy: str
    cancel_after: int
    stream: bool
    sum: str = ""
    calls: int = 0


def draw(rng: random.Random, name: str, *, crowded: bool = False) -> Work:
    """Draws one message; `name` makes its text unlike any other's."""
    script, words = rng.choices([_plain, _tool, _tools, _broken], weights=[5, 5, 2, 2])[0](rng)
    # More digits than a float, or than JavaScript's numbers, keep.
    number = f"{random.Random(name).randint(10**22, 10**23)}"
    text = f"{name} [[{script}]]"
    return Work(
        text=text.replace(_SUM, number),
        words=words,
        sum=number if _SUM in text else "",
        policy=rng.choices(POLICIES, weights=[5, 1, 2, 2])[0] if crowded else "enqueue",
        cancel_after=rng.randint(2, 12) if rng.random() < CANCELLED else 0,
        stream=rng.random() < 0.6,
    )


def large(megabytes: float, name: str) -> Work:
    """A run whose tools' results make up so many megabytes, in several turns of many calls."""
    calls = max(1, round(megabytes * 1_000_000 / _PAGE_CHARACTERS))
    turns = -(-calls // _SIDE_BY_SIDE)
    calls = -(-calls // turns)
    script = f"tool=pages {json.dumps({'characters': _PAGE_CHARACTERS})} calls={calls} turns={turns}"
    return Work(
        text=f"{name} [[{script} tokens={_LARGE_WORDS} rate=20]]",
        words=_LARGE_WORDS,
        policy="enqueue",
        cancel_after=0,
        stream=True,
        calls=calls * turns,
    )


Script = Callable[[random.Random], tuple[str, int]]


def _plain(rng: random.Random) -> tuple[str, int]:
    words = rng.randint(10, 60)
    return f"tokens={words} rate={rng.randint(20, 60)}", words


def _tool(rng: random.Random) -> tuple[str, int]:
    name = rng.choices(["charge", "reserve", "look_up", "wire_money"], weights=[5, 4, 1, 1])[0]
    return _call(rng, name), 0


def _tools(rng: random.Random) -> tuple[str, int]:
    names = rng.choices(["charge", "reserve", "look_up"], weights=[4, 4, 1], k=rng.randint(2, 3))
    return "]] [[".join(_call(rng, name) for name in names), 0


def _call(rng: random.Random, name: str) -> str:
    waits = {"before": round(rng.uniform(0, 0.4), 2), "after": round(rng.uniform(0, 0.8), 2)}
    return f'tool={name} {json.dumps(waits)[:-1]}, "sum": {_SUM}}}'


def _broken(rng: random.Random) -> tuple[str, int]:
    words = rng.randint(10, 40)
    fault = rng.choice(["half", "silent", "garbage", "status=503", "status=429 retry_after=0.2"])
    return f"tokens={words} rate=40 {fault} times=1", words
