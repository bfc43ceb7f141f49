"""Reads replies after they were measured: whether all of it came, and when each token did. Pure functions."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from bench.load import Reply
from bench.target import IncompleteReply, Target

_TOKEN = re.compile(rb"t(\d+)(?!\d)")
SHOWN_BYTES = 300


def check(target: Target, reply: Reply, expected: str) -> None:
    """Makes sure that a reply is whole: every token, in order, once, and its end.

    Raises:
        IncompleteReply: It is not.
    """
    if reply.error:
        raise IncompleteReply(f"{target.name}: {reply.error}")
    text = target.text(reply.body)
    if text != expected:
        same = next((n for n, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), None)
        at = min(len(text), len(expected)) if same is None else same
        raise IncompleteReply(
            f"{target.name}: {len(text)} characters came where {len(expected)} were written; they differ "
            f"from character {at} on: {text[at : at + 60]!r} in place of {expected[at : at + 60]!r}"
        )


def first_at(target: Target, reply: Reply) -> int:
    """Returns when the first token was there, in nanoseconds. Raises IncompleteReply when there is none."""
    found = target.first_token.search(reply.body)
    if found is None:
        raise IncompleteReply(f"{target.name}: no token in {reply.body[-SHOWN_BYTES:]!r}")
    return _arrival(reply.marks, found.end())


def arrivals(target: Target, reply: Reply, count: int) -> list[int]:
    """Returns when each of the tokens `t0`, `t1`, ... was there, in nanoseconds.

    A token is there when the line of the body that it stands in is complete. Servers batch differently:
    tokens that came together have the same time.

    Raises:
        IncompleteReply: There are fewer than `count` in their order.
    """
    body = reply.body
    found = target.first_token.search(body)
    position = found.start() if found else 0
    times: list[int] = []
    for match in _TOKEN.finditer(body, position):
        if int(match[1]) != len(times):
            continue
        end = body.find(b"\n", match.end())
        times.append(_arrival(reply.marks, len(body) if end < 0 else end))
        if len(times) == count:
            return times
    raise IncompleteReply(f"{target.name}: only {len(times)} of {count} tokens can be found in a reply")


def _arrival(marks: Sequence[tuple[int, int]], position: int) -> int:
    """When the byte before `position` was there."""
    return marks[bisect_left(marks, position, key=lambda mark: mark[1])][0]


def gaps(times: Sequence[int]) -> list[int]:
    """Returns the time between each token and the one before it; 0 for those that came together."""
    return [after - before for before, after in pairwise(times)]


def added(times: Sequence[int], started: int, rate: float) -> list[int]:
    """Returns how much later than the model's schedule each token was there, in nanoseconds.

    Args:
        times: when the tokens were there.
        started: when the model began the reply; its first token is due one interval later.
        rate: tokens a second.
    """
    return [at - started - round((number + 1) * 1e9 / rate) for number, at in enumerate(times)]
