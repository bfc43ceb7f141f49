"""Proves the eleven invariants from a recorded history, or names what breaks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tests.chaos.model.history import History
from tests.chaos.validate.deletions import check_deletions
from tests.chaos.validate.facts import Facts, Violation
from tests.chaos.validate.fences import (
    check_fences,
    check_live_entries,
    check_live_writes,
    check_stale_writes,
)
from tests.chaos.validate.messages import check_keys, check_messages
from tests.chaos.validate.runs import check_runs
from tests.chaos.validate.streams import check_clients, check_streams
from tests.chaos.validate.tools import check_calls, check_idempotency

__all__ = ["CHECKS", "INVARIANTS", "Facts", "Violation", "check"]

CHECKS: tuple[Callable[[Facts], Iterable[Violation]], ...] = (
    check_messages,
    check_fences,
    check_stale_writes,
    check_live_writes,
    check_calls,
    check_idempotency,
    check_streams,
    check_live_entries,
    check_runs,
    check_keys,
    check_clients,
    check_deletions,
)

# As a person reads them, in the order of their numbers.
INVARIANTS = (
    "an acknowledged message is in the log exactly once, in order",
    "fences never decrease",
    "nothing is written under a stale fence, in PostgreSQL or Redis",
    "a non-idempotent call acts at most once",
    "an idempotent call always uses one key",
    "a client's stream is a gap-free, duplicate-free prefix of the log",
    "Redis's stream is a subset of the log",
    "every run ends, or says that it needs action, within the bound",
    "one Idempotency-Key gives one response",
    "a drain shows clients no error",
    "of a deleted session nothing comes back",
)


def check(history: History) -> list[Violation]:
    """Returns every violation of every invariant, by the invariant's number."""
    facts = Facts(history)
    found = [violation for check_one in CHECKS for violation in check_one(facts)]
    return sorted(found, key=lambda violation: violation.invariant)
