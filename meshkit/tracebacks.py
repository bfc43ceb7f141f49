"""Exceptions as text for a log: plain, and bounded in every direction.

No values of variables, which hold keys and whole conversations; not more frames, causes, members or
characters than a person reads, however deep the stack was or whatever the exception carries. It takes time in
proportion to what it prints, so that an error cannot hold a process up.
"""

from __future__ import annotations

import itertools
import traceback
from collections import deque
from types import TracebackType

MAX_CHARS = 6_000
MAX_MESSAGE = 500
MAX_CAUSES = 4
MAX_MEMBERS = 3
_FIRST_FRAMES = 4
_LAST_FRAMES = 12
_MAX_LINE = 200

_CAUSE = "The above exception was the direct cause of:"
_CONTEXT = "During the handling of the above exception came:"


def exception_text(error: BaseException) -> str:
    """Returns an exception, its causes before it, in at most about `MAX_CHARS` characters."""
    return bounded("\n".join(_chain(error, members=True)), MAX_CHARS)


def bounded(text: str, limit: int) -> str:
    """Returns a text without its middle if it has more characters than the limit."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... [{len(text) - 2 * half} characters left out] ... {text[-half:]}"


def _chain(error: BaseException, *, members: bool) -> list[str]:
    blocks: list[list[str]] = []
    current: BaseException | None = error
    seen: set[int] = set()
    link = ""
    while current is not None and id(current) not in seen:
        if len(blocks) == MAX_CAUSES:
            blocks.append(["[earlier causes are left out]"])
            break
        seen.add(id(current))
        block = _one(current, members=members)
        blocks.append([*block, link] if link else block)
        if current.__cause__ is not None:
            current, link = current.__cause__, _CAUSE
        elif current.__context__ is not None and not current.__suppress_context__:
            current, link = current.__context__, _CONTEXT
        else:
            current = None
    return [line for block in reversed(blocks) for line in block]


def _one(error: BaseException, *, members: bool) -> list[str]:
    lines = _frames(error.__traceback__)
    lines.append(f"{type(error).__qualname__}: {_message(error)}".rstrip(": "))
    for note in list(getattr(error, "__notes__", ()))[:MAX_MEMBERS]:
        lines.append(bounded(str(note), MAX_MESSAGE))
    if isinstance(error, BaseExceptionGroup):
        inner = error.exceptions
        for number, member in enumerate(inner[:MAX_MEMBERS] if members else (), 1):
            lines.append(f"  {number} of {len(inner)}:")
            lines.extend(f"    {line}" for line in _chain(member, members=False))
    return lines


def _message(error: BaseException) -> str:
    try:
        return bounded(str(error), MAX_MESSAGE)
    except Exception:
        return "[its text cannot be made]"


def _frames(trace: TracebackType | None) -> list[str]:
    frames = traceback.walk_tb(trace)
    first = list(itertools.islice(frames, _FIRST_FRAMES))
    last: deque[tuple[object, int]] = deque(maxlen=_LAST_FRAMES)
    count = 0
    for item in frames:
        last.append(item)
        count += 1
    lines = _shown(first)
    if count > len(last):
        lines.append(f"  [{count - len(last)} frames left out]")
    return lines + _shown(last)


def _shown(frames: object) -> list[str]:
    lines: list[str] = []
    # Source lines are looked up for these few frames only.
    for frame in traceback.StackSummary.extract(iter(frames), capture_locals=False):  # type: ignore[call-overload]
        lines.append(f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}')
        if frame.line:
            lines.append(f"    {frame.line[:_MAX_LINE]}")
    return lines
