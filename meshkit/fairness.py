"""Who gets the next place when there are few: dynamic thresholds, by tenant.

A tenant may hold up to `SHARE` times what is free. One that floods alone stops at 8/9 of the places, two
share them evenly, and so on; some are always left for one that was not here before. Nothing has to be
configured, and nothing remembered but how many places each one holds.
"""

SHARE = 8


def admits(mine: int, used: int, limit: int) -> bool:
    """Returns whether a tenant that holds `mine` of the `used` places gets another one of `limit`."""
    return used < limit and mine < SHARE * (limit - used)
