import pytest

from meshkit.errors import InvalidArgumentError
from meshkit.paging import make_page_token, read_page_token


@pytest.mark.parametrize("position", ["x", "01890000-0000-7000-8000-000000000001", "é|1"])
def test_a_token_gives_its_position_back(position: str) -> None:
    token = make_page_token("ListRuns", ["tenant", 7], position)
    assert read_page_token("ListRuns", ["tenant", 7], token) == position
    assert token.isascii()


def test_no_token_is_the_first_page() -> None:
    assert read_page_token("ListRuns", ["tenant"], "") == ""


@pytest.mark.parametrize("token", ["x", "é", "====", "a" * 5_000, "AAAAAAAAAAAAAAAA"])
def test_a_token_of_nobody_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        read_page_token("ListRuns", ["tenant"], token)
    assert error.value.reason == "PAGE_TOKEN_INVALID"
    assert error.value.violations[0].field == "page_token"


def test_a_token_of_another_list_is_refused() -> None:
    token = make_page_token("ListRuns", ["tenant-1"], "p")
    for method, bound in (("ListRuns", ["tenant-2"]), ("ListSessions", ["tenant-1"]), ("ListRuns", [])):
        with pytest.raises(InvalidArgumentError):
            read_page_token(method, bound, token)
