"""The form of API keys."""

from __future__ import annotations

import pytest

from meshkit.api_keys import is_tag, make_key, tag_of


@pytest.mark.parametrize("tag", ["a", "acme", "7-up", "a" * 32, "a-b-c"])
def test_a_key_shows_the_tag_that_it_was_made_with(tag: str) -> None:
    key = make_key(tag)
    assert tag_of(key) == tag
    assert len(key) > len(tag) + 48
    assert make_key(tag) != key


@pytest.mark.parametrize(
    "key",
    [
        "",
        "hm_",
        "hm_" + "0f" * 24,
        "hm_acme",
        "hm_acme_",
        "hm_Acme_x",
        "hm__x",
        "hm_-a_x",
        "sk_acme_x",
        "acme_x",
        "hm_" + "a" * 33 + "_x",
        " hm_acme_x",
        "hm_a.b_x",
        "hm_é_x",
    ],
)
def test_other_keys_have_none(key: str) -> None:
    assert tag_of(key) == ""


@pytest.mark.parametrize("tag", ["", "Acme", "-a", "a_b", "a" * 33, "a b", "a\n"])
def test_what_can_be_no_tag_makes_no_key(tag: str) -> None:
    assert not is_tag(tag)
    with pytest.raises(ValueError, match="is no tag"):
        make_key(tag)
