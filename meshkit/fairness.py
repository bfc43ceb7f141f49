"""Who gets the next place when there are few: dynamic thresholds, by tenant.

A tenant may hold up to `SHARE` times what is free. One that floods alone stops at 8/9 of the places, two
share them evenly, and so on; some are always left for one that was not here before. Nothing has to be
configured, and nothing remembered but how many places each one holds.
"""

import random

from meshkit.errors import ResourceExhaustedError

SHARE = 8
_spread = random.Random()  # noqa: S311 -- spreads load, keeps no secret


def admits(mine: int, used: int, limit: int) -> bool:
    """Returns whether a tenant that holds `mine` of the `used` places gets another one of `limit`."""
    return used < limit and mine < SHARE * (limit - used)


def overloaded(message: str, wait_ms: float, rng: random.Random = _spread) -> ResourceExhaustedError:
    """Returns the refusal of one that gets none: to come back after about `wait_ms`.

    Those who are refused together do not come back together: half as long again at most, and half at least.
    """
    wait = round(wait_ms * rng.uniform(0.5, 1.5))
    return ResourceExhaustedError("OVERLOADED", message, retry_after_ms=wait)
