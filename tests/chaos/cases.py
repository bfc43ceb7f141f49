"""Seeds that found something: each stays, and is played again wherever the suite is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """A bug that an episode found.

    Attributes:
        name: short.
        seed: of the episode.
        what: what was wrong, or what is broken for the first time in the episode.
        theme: that the seed's faults are drawn from; empty where `faults` names them.
        faults: the names of the episode's faults, one after the other.
    """

    name: str
    seed: int
    what: str
    theme: str = ""
    faults: tuple[str, ...] = ()


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
)
