"""Episodes with a name, played wherever the suite is: seeds that found something, each sort of fault once.

A seed that found something stays.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One episode.

    Attributes:
        name: short.
        seed: of the episode.
        what: what was wrong, or what is broken for the first time in the episode.
        theme: that the seed's faults are drawn from; empty where `faults` names them.
        faults: the names of the episode's faults, one after the other.
        megabytes: of tools' results in each run of one more client.
    """

    name: str
    seed: int
    what: str
    theme: str = ""
    faults: tuple[str, ...] = ()
    megabytes: float = 0.0


CASES = (
    Case(
        "clock-went-back",
        1053,
        "PostgreSQL's clock was an hour ahead while runs were queued and leases given, and PostgreSQL was "
        "down when it was set right: those runs were due, and those leases over, only an hour later.",
        theme="stores",
    ),
    Case(
        "closed-before-reconnect",
        9101,
        "A gateway that drained was stopped in the moment in which its WebSockets were to say reconnect: "
        "the server's own close came first, and a client saw a stream that broke.",
        theme="drains",
    ),
    Case(
        "postgres-frozen",
        9201,
        "PostgreSQL stands still, as a whole, for less and for more than a lease lasts.",
        faults=("postgres_frozen",),
    ),
    Case(
        "postgres-unwell",
        9202,
        "PostgreSQL's rows are locked by a stranger, it has no connection left, its backends are terminated.",
        faults=("postgres_locked", "postgres_full", "postgres_terminated"),
    ),
    Case(
        "valkey-unwell",
        9203,
        "Valkey has no memory left, is slow, has another password, and comes back with an old dump.",
        faults=("valkey_full", "valkey_slow", "valkey_password", "valkey_stale"),
    ),
    Case(
        "edge-unwell",
        9204,
        "Envoy stands still, and endpoint files are none or lead nowhere until somebody says `hermesh up`, "
        "which waited for Envoy before it put them right, and failed.",
        faults=("endpoints_bad", "envoy_frozen"),
    ),
    Case(
        "nobody-supervises",
        9205,
        "The supervisor is killed and replaced; then the last agent is taken away and some are asked for.",
        faults=("supervisor_lost", "scale_zero"),
    ),
    Case(
        "machine-lost",
        9206,
        "Everything there is is killed at once and started as after a boot.",
        faults=("machine_lost",),
    ),
    Case(
        "large-run",
        9207,
        "A run whose own results pass what one message may hold loses its agents.",
        faults=("kill_agent", "kill_agent", "kill_agent"),
        megabytes=12.0,
    ),
)
