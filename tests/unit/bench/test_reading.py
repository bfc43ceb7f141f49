"""Whether a reply is whole, and when each token came."""

import pytest

from bench.reading import added, arrivals, check, first_at, gaps
from bench.target import IncompleteReply
from tests.unit.bench.conftest import reply_of

WHOLE = [(2_000, b"text: t0 \n"), (3_000, b"text: t1 t2 \n"), (4_000, b"end\n")]
TEXT = "t0 t1 t2 "


def test_a_whole_reply_passes(plain):
    check(plain, reply_of(*WHOLE), TEXT)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        (WHOLE[:2], "no end"),
        ([WHOLE[0], WHOLE[2]], "3 characters came where 9"),
        ([WHOLE[1], WHOLE[0], WHOLE[2]], "differ from character 1"),
        ([WHOLE[0], *WHOLE], "12 characters came where 9"),
        ([(2_000, b"end\n")], "0 characters"),
    ],
)
def test_whatever_lacks_repeats_or_swaps_tokens_is_no_result(plain, pieces, error):
    with pytest.raises(IncompleteReply, match=error):
        check(plain, reply_of(*pieces), TEXT)


def test_a_failed_request_is_no_result_even_when_its_text_is_whole(plain):
    with pytest.raises(IncompleteReply, match="status 503"):
        check(plain, reply_of(*WHOLE, error="status 503"), TEXT)


def test_each_token_has_the_time_at_which_its_line_was_complete(plain):
    assert arrivals(plain, reply_of(*WHOLE), 3) == [2_000, 3_000, 3_000]
    assert first_at(plain, reply_of(*WHOLE)) == 2_000


def test_a_line_that_comes_in_two_pieces_counts_when_its_end_is_there(plain):
    reply = reply_of((2_000, b"text: t"), (2_500, b"0"), (2_700, b" \ntext: t1 \n"), (4_000, b"end\n"))
    assert arrivals(plain, reply, 2) == [2_700, 2_700]
    assert first_at(plain, reply) == 2_000


def test_what_looks_like_a_token_before_the_text_or_out_of_order_is_none(plain):
    reply = reply_of(
        (1_500, b"id: t0 t1\n"), (2_000, b"text: t0 about t7 \n"), (3_000, b"text: t1 t12 t2 \n")
    )
    assert arrivals(plain, reply, 3) == [2_000, 3_000, 3_000]


def test_too_few_tokens_are_no_result(plain):
    with pytest.raises(IncompleteReply, match="only 3 of 4"):
        arrivals(plain, reply_of(*WHOLE), 4)
    with pytest.raises(IncompleteReply, match="no token"):
        first_at(plain, reply_of((2_000, b"end\n")))


def test_gaps_and_lateness():
    times = [30_000_000, 45_000_000, 45_000_000]
    assert gaps(times) == [15_000_000, 0]
    # 100 a second from 10 ms on: due at 20, 30 and 40 ms.
    assert added(times, 10_000_000, 100) == [10_000_000, 15_000_000, 5_000_000]
