"""Tenants of unequal size in cells."""

from __future__ import annotations

import pytest

from bench.cells_forecast import NEAR, placement


@pytest.mark.parametrize("cells", [2, 4, 10, 40])
def test_moves_make_the_fullest_cell_less_full_and_no_tenant_smaller(cells: int) -> None:
    found = placement(cells)
    assert found.hashed >= found.moved
    # What cannot be near the mean is as large as its largest tenant makes it.
    assert found.moved <= NEAR * max(1, found.largest * cells) + 1e-9
    assert found.moves < 100


def test_one_cell_holds_everybody() -> None:
    found = placement(1)
    assert (found.hashed, found.moves) == (pytest.approx(1.0), 0)
