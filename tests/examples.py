"""How many examples a property test draws: few, or as many as HERMESH_TEST_EXAMPLES says."""

import os

_ASKED = int(os.environ.get("HERMESH_TEST_EXAMPLES", "0"))


def examples(usual: int) -> int:
    """Return how many: `usual`, or more when asked."""
    return max(usual, _ASKED)
