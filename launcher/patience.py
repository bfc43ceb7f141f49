"""Saying what a silent run waits for: a person who sees nothing for seconds thinks that all is broken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SILENT_SECONDS = 3.0
# What is asked then has a time limit of its own, a little below this.
JOIN_SECONDS = 3.0


def explained(events: Iterable[T], problem: Callable[[], str], say: Callable[[str], None]) -> Iterator[T]:
    """Passes events on, and says what is wrong when none comes for `SILENT_SECONDS`, once each time.

    Args:
        events: A run's events; waiting for one blocks.
        problem: Returns what keeps the run, empty for nothing that is known. Called in another thread.
        say: Told what it returned, in that thread.
    """
    changed = threading.Condition()
    count, over = 0, False

    def watch() -> None:
        while not over:
            before = count

            def heard(before: int = before) -> bool:
                return over or count != before

            with changed:
                if changed.wait_for(heard, SILENT_SECONDS):
                    continue
            if (text := problem()) and not heard():
                say(text)
            with changed:
                changed.wait_for(heard)

    thread = threading.Thread(target=watch, name="patience", daemon=True)
    thread.start()
    try:
        for event in events:
            with changed:
                count += 1
                changed.notify()
            yield event
    finally:
        with changed:
            over = True
            changed.notify()
        thread.join(JOIN_SECONDS)
