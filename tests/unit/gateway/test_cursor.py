from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cursor import GapError, RunCursor, SessionCursor, parse_event_id, parse_seq

RUN = "01890000-0000-7000-8000-00000000000a"
NEXT = "01890000-0000-7000-8000-00000000000b"


@dataclass(frozen=True)
class E:
    run_id: str
    seq: int
    type: str = "text.delta"


def log(run_id: str, length: int) -> list[E]:
    return [E(run_id, n, "run.completed" if n == length else "text.delta") for n in range(1, length + 1)]


SOURCES = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 15), st.integers(1, 5)), max_size=8)


def batches(whole: list[E], here: int, sources: list[tuple[int, int, int]], back_to: int) -> list[list[E]]:
    """Returns what one broken source sends: from a little before `here` on, in batches."""
    back, forward, size = sources.pop(0) if sources else (0, len(whole), 3)
    at, until = max(back_to, here - back), min(len(whole), here + forward)
    return [whole[n : min(n + size, until)] for n in range(at, until, size)]


@given(st.integers(1, 40), SOURCES)
def test_sources_that_start_anywhere_before_the_cursor_give_the_log_once(
    length: int, sources: list[tuple[int, int, int]]
) -> None:
    """Broken and repeated streams, each a part of the log from somewhere at or before the cursor."""
    whole = log(RUN, length)
    cursor = RunCursor()
    got: list[E] = []
    while not cursor.finished:
        for batch in batches(whole, cursor.last_seq, sources, 0):
            got += cursor.admit(batch)
    assert got == whole


@given(st.integers(0, 20), st.lists(st.integers(1, 30), max_size=30))
def test_whatever_a_source_sends_what_is_delivered_has_no_gap_and_no_duplicate(
    after: int, seqs: list[int]
) -> None:
    cursor = RunCursor(RUN, after)
    got: list[int] = []
    for seq in seqs:
        try:
            got += [event.seq for event in cursor.admit([E(RUN, seq)])]
        except GapError:
            assert seq > cursor.last_seq + 1
    assert got == list(range(after + 1, after + 1 + len(got)))
    assert cursor.last_seq == after + len(got)


def test_a_gap_in_a_batch_moves_nothing() -> None:
    cursor = RunCursor(RUN, 3)
    with pytest.raises(GapError):
        cursor.admit([E(RUN, 4), E(RUN, 6)])
    assert cursor.last_seq == 3
    assert [e.seq for e in cursor.admit([E(RUN, 4), E(RUN, 5), E(RUN, 6)])] == [4, 5, 6]


def test_another_runs_event_is_a_gap() -> None:
    cursor = RunCursor(RUN)
    with pytest.raises(GapError):
        cursor.admit([E(NEXT, 1)])


def test_nothing_follows_the_terminal_event() -> None:
    cursor = RunCursor(RUN)
    cursor.admit(log(RUN, 2))
    assert cursor.finished
    assert cursor.admit(log(RUN, 2)) == []
    with pytest.raises(GapError):
        cursor.admit([E(RUN, 3)])


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), SOURCES)
def test_a_session_is_delivered_run_after_run_over_any_cuts(
    lengths: list[int], sources: list[tuple[int, int, int]]
) -> None:
    runs = [f"01890000-0000-7000-8000-{n:012d}" for n in range(len(lengths))]
    whole = [event for run_id, length in zip(runs, lengths, strict=True) for event in log(run_id, length)]
    cursor = SessionCursor()
    got: list[E] = []
    while len(got) < len(whole):
        # A new source starts in the cursor's run, at or before the cursor.
        for batch in batches(whole, len(got), sources, len(got) - cursor.last_seq):
            got += cursor.admit(batch)
    assert got == whole
    assert (cursor.run_id, cursor.last_seq) == (whole[-1].run_id, whole[-1].seq)


def test_a_session_refuses_the_next_run_before_the_last_one_ended() -> None:
    cursor = SessionCursor()
    cursor.admit([E(RUN, 1)])
    with pytest.raises(GapError):
        cursor.admit([E(NEXT, 1)])
    assert (cursor.run_id, cursor.last_seq) == (RUN, 1)


def test_a_gap_in_the_second_run_of_a_batch_takes_the_first_one_back_too() -> None:
    cursor = SessionCursor()
    with pytest.raises(GapError):
        cursor.admit([*log(RUN, 2), E(NEXT, 2)])
    assert (cursor.run_id, cursor.last_seq) == ("", 0)
    assert len(cursor.admit([*log(RUN, 2), E(NEXT, 1)])) == 3


def test_a_finished_run_that_comes_again_is_dropped() -> None:
    cursor = SessionCursor()
    cursor.admit([*log(RUN, 2), E(NEXT, 1)])
    assert cursor.admit(log(RUN, 2)) == []
    assert cursor.run_id == NEXT


def test_a_resumed_session_takes_the_next_run_although_it_never_saw_the_end() -> None:
    cursor = SessionCursor(RUN, 2)
    assert len(cursor.admit([E(NEXT, 1)])) == 1


@pytest.mark.parametrize("text", ["", "x", f"{RUN}", f"{RUN}:", f"{RUN}:-1", f"{RUN}:x", "no:3", f"{RUN}:²"])
def test_a_malformed_event_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_event_id(text)


def test_an_event_id_is_read_in_any_case() -> None:
    assert parse_event_id(f"{RUN.upper()}:12") == (RUN, 12)


@pytest.mark.parametrize("text", ["2147483648", "99999999999", "1.0", "+1", " 1"])
def test_a_seq_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_seq(text)
