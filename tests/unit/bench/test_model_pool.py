"""What the bench of the model pool reads out of a run's events."""

from __future__ import annotations

import pytest

from bench.model_pool import Turn, cells, plan, question, read_usage, summed
from bench.sse_client import BadAnswer

LOG = (
    b"id: r:3\nevent: usage\n"
    b'data: {"run_id":"r","seq":3,"type":"usage","time":1,"data":{"input_tokens":90,"cached_tokens":60}}\n\n'
    b"id: r:4\nevent: run.completed\n"
    b'data: {"run_id":"r","seq":4,"type":"run.completed","time":1,"data":{}}\n\n'
)


def test_prompt_and_cached_tokens_are_read() -> None:
    assert read_usage(LOG) == (90, 60)


def test_a_run_that_did_not_complete_is_no_result() -> None:
    with pytest.raises(BadAnswer):
        read_usage(LOG.partition(b"id: r:4")[0])


def test_a_first_turn_does_not_count() -> None:
    turns = [Turn(0, 900.0, 50, 0), Turn(1, 100.0, 100, 80), Turn(2, 300.0, 150, 120)]
    found = summed("session", turns, 5.0)
    assert (found.turns, found.prompt, found.cached, found.first_p50_ms) == (2, 250, 200, 200.0)
    assert found.share == 0.8


def test_no_two_turns_ask_the_same() -> None:
    assert len({question(session, turn) for session in range(8) for turn in range(5)}) == 40


def test_a_row_has_least_median_and_most_of_the_rounds() -> None:
    rounds = [
        summed("session", [Turn(1, first, 100, cached)], 5.0) for first, cached in ((9, 50), (5, 90), (7, 60))
    ]
    assert cells(rounds) == [
        *("session", "3", "300", "50% / 60% / 90%", "5 / 7 / 9", "5 / 7 / 9", "5 / 5 / 5"),
    ]


def test_every_session_has_all_of_its_turns_in_order_among_the_others() -> None:
    asked = plan(8, 5)
    for session in range(8):
        assert [turn for one, turn in asked if one == session] == list(range(5))
    orders = {tuple(one for one, turn in asked if turn == number) for number in range(5)}
    assert len(orders) > 1
    assert asked == plan(8, 5)
