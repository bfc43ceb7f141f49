import time

import pytest

from meshkit.context import (
    accept_request_id,
    current_request_id,
    deadline_var,
    remaining,
    request_id_var,
)


def test_a_harmless_request_id_is_kept() -> None:
    assert accept_request_id("req-1.A_b:c") == "req-1.A_b:c"


@pytest.mark.parametrize("offered", [None, "", "a b", "a\nb", "x" * 129, 'a"b', "é"])
def test_any_other_request_id_is_replaced(offered: str | None) -> None:
    made = accept_request_id(offered)
    assert made != offered
    assert len(made) == 36


def test_request_id_is_empty_outside_of_a_request() -> None:
    assert current_request_id() == ""
    token = request_id_var.set("r")
    assert current_request_id() == "r"
    request_id_var.reset(token)


def test_remaining_is_none_without_a_deadline_and_never_negative() -> None:
    assert remaining() is None
    token = deadline_var.set(time.monotonic() + 5)
    left = remaining()
    assert left is not None
    assert 4 < left <= 5
    deadline_var.set(time.monotonic() - 5)
    assert remaining() == 0.0
    deadline_var.reset(token)
