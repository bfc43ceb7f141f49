"""Places in fair shares."""

from __future__ import annotations

from collections import Counter

import pytest

from meshkit.fairness import SHARE, admits


def fill(limit: int, tenants: list[str], counts: Counter[str] | None = None) -> Counter[str]:
    """Tenants ask in turn until nobody gets any more."""
    held: Counter[str] = Counter(counts or {})
    while True:
        got = False
        for tenant in tenants:
            if admits(held[tenant], held.total(), limit):
                held[tenant] += 1
                got = True
        if not got:
            return held


@pytest.mark.parametrize("limit", [1, 2, 8])
def test_of_few_places_one_tenant_may_have_all(limit: int) -> None:
    assert fill(limit, ["flood"]) == {"flood": limit}


def test_a_flood_leaves_places_and_whoever_comes_gets_them_until_shares_are_even() -> None:
    held = fill(900, ["flood"])
    assert held["flood"] == 900 * SHARE // (SHARE + 1)
    both = fill(900, ["polite"], held)
    assert both["polite"] > 80
    while both["flood"] > both["polite"]:  # The flood's runs end, and it asks for more all the time.
        both["flood"] -= 1
        both = (
            fill(900, ["flood", "polite"], both)
            if both["flood"] < both["polite"]
            else fill(900, ["polite"], both)
        )
    assert abs(both["flood"] - both["polite"]) <= 2 * SHARE


def test_no_more_than_all_places_are_given() -> None:
    assert not admits(0, 10, 10)
    assert fill(100, [f"tenant {n}" for n in range(300)]).total() == 100
