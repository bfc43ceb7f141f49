import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit.errors import InvalidArgumentError
from meshkit.paging import make_page_token, read_page_token

BOUND = ("tenant", "user", "ann")


@given(position=st.text(min_size=1, max_size=50))
def test_a_token_gives_its_position_back(position: str) -> None:
    assert read_page_token("List", BOUND, make_page_token("List", BOUND, position)) == position


def test_no_token_is_the_first_page() -> None:
    assert read_page_token("List", BOUND, "") == ""


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "not a token",
        "ä",
        "====",
        "AAAA",
        base64.urlsafe_b64encode(b"12345678").decode(),
        base64.urlsafe_b64encode(b"12345678position").decode(),
        make_page_token("Other", BOUND, "5"),
        make_page_token("List", ("tenant", "user", "bob"), "5"),
        make_page_token("List", ("tenant", "us", "erann"), "5"),
        make_page_token("List", BOUND, "5") + "A",
    ],
)
def test_a_token_of_something_else_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_page_token("List", BOUND, token)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"
    assert caught.value.violations[0].field == "page_token"
