"""The scenarios as data: what is asked of a server under load, and the goals that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from bench.model_script import sequence, words


class Kind(StrEnum):
    """What a scenario does."""

    REPLIES = "replies"
    WATCHERS = "watchers"
    LONG_SESSIONS = "long_sessions"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should be; the median of the runs is compared.

    Attributes:
        figure: its name among the scenario's figures.
        bound: the limit.
        what: how the page names it.
        unit: printed after the numbers.
        at_least: whether the bound is a lower one.
    """

    figure: str
    bound: float
    what: str
    unit: str
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether a value meets it."""
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True, slots=True)
class Replies:
    """Clients that ask, each one question after the other, every one in a session of its own.

    Attributes:
        name: how the command line names it.
        title: how tables name it.
        clients: how many ask at once.
        asks: questions of each client in one run.
        tokens: of each reply.
        rate: tokens a second at which the model writes; 0 for as fast as the socket takes them.
        script: directives for the model in place of a reply of `tokens` tokens; `reply` must come then.
        reply: the text expected for `script`.
        spread: seconds over which the clients begin; at once, the tokens of paced streams would be in step.
        memory: whether long-term memory is read.
        baseline: whether the model alone can be asked the same.
        quick: questions of each client in a quick run; None keeps it out of one.
        goals: what its figures are compared with.
    """

    name: str
    title: str
    clients: int
    asks: int
    tokens: int = 200
    rate: float = 0.0
    script: str = ""
    reply: str = ""
    spread: float = 0.0
    memory: bool = False
    baseline: bool = True
    quick: int | None = None
    goals: Sequence[Goal] = ()
    kind: Kind = field(default=Kind.REPLIES, init=False)

    @property
    def counted(self) -> bool:
        """Whether the reply is the model's numbered tokens, so that each can be timed."""
        return not self.script

    @property
    def expected(self) -> str:
        """The text that every reply must have."""
        return self.reply if self.script else "".join(sequence(self.tokens))

    @property
    def reply_tokens(self) -> int:
        """How many tokens the expected text has."""
        return len(words(self.reply)) if self.script else self.tokens

    def prompt(self, ident: str) -> str:
        """Returns the question; by `ident` the model server tells when it began the answer."""
        pace = f" rate={self.rate:g}" if self.rate else ""
        return self.script or f"[[tokens={self.tokens}{pace} id={ident}]]"


@dataclass(frozen=True, slots=True)
class Watchers:
    """Clients that follow sessions over SSE while nothing happens, until something does.

    Attributes:
        watchers: how many.
        sessions: how many sessions they follow, as many of them each.
        first: how many are opened before memory is first read.
        idle_seconds: how long nothing happens while CPU is measured.
        events_per_second: at which rate sessions get their next event.
        deadline_seconds: within which each watcher must have its event, or the run fails.
    """

    name: str
    title: str
    watchers: int
    sessions: int
    first: int = 100
    idle_seconds: float = 20.0
    events_per_second: float = 50.0
    deadline_seconds: float = 30.0
    quick: int | None = None
    goals: Sequence[Goal] = ()
    kind: Kind = field(default=Kind.WATCHERS, init=False)


@dataclass(frozen=True, slots=True)
class LongSessions:
    """The first token of a turn in short and in long sessions, one client, turn about.

    Attributes:
        short: messages of a short session before the first measured turn.
        long: messages of a long one.
        sessions: how many of each.
        turns: measured turns in each.
    """

    name: str
    title: str
    short: int
    long: int
    sessions: int
    turns: int
    quick: int | None = None
    goals: Sequence[Goal] = ()
    kind: Kind = field(default=Kind.LONG_SESSIONS, init=False)


Scenario = Replies | Watchers | LongSessions

TTFT = Goal("ttft_added_ms", 12, "First token at one client, added to the model's, p50", "ms")
RATE = Goal("tokens_per_second", 12_000, "Tokens a second at 32 clients", "tokens/s", at_least=True)
CPU = Goal("cpu_per_1000", 0.05, "CPU of the mesh with Envoy at 32 clients", "CPU s / 1,000 tokens")
PACED_CPU = Goal(
    "cpu_per_1000", 0.25, "CPU of the mesh with Envoy at 100 streams of 50 tokens/s", "CPU s / 1,000 tokens"
)
PACED_ADDED = Goal("added_p99_ms", 25, "Added to each token at 100 streams of 50 tokens/s, p99", "ms")
PACED_BEHIND = Goal("behind", 0, "Streams of 100 at 50 tokens/s that fell behind", "streams")
LONG = Goal("ttft_ratio", 2, "First token in a session of 10,000 messages, times that of 10", "times")
WATCHER_MEMORY = Goal("gateway_kib_each", 25, "Gateway's memory for each of 5,000 idle watchers", "KiB")
WATCHER_CPU = Goal("gateway_percent", 5, "Gateway's CPU with 5,000 idle watchers", "% of a core")
WATCHER_EVENT = Goal("event_max_ms", 1000, "Next event of each of 5,000 watchers, the slowest", "ms")

SCENARIOS: tuple[Scenario, ...] = (
    Replies("clients_1", "1 client", clients=1, asks=40, quick=20, goals=(TTFT,)),
    Replies("memory_1", "1 client, memories recalled", clients=1, asks=40, memory=True, baseline=False),
    Replies("clients_32", "32 clients", clients=32, asks=6, quick=3, goals=(RATE, CPU)),
    Replies("clients_100", "100 clients", clients=100, asks=3),
    Replies("clients_400", "400 clients", clients=400, asks=1),
    Replies("flood", "flood: 16 long replies", clients=16, asks=1, tokens=4_000),
    Replies(
        "paced_100",
        "100 streams of 50 tokens/s",
        clients=100,
        asks=2,
        tokens=500,
        rate=50,
        spread=5.0,
        quick=1,
        goals=(PACED_CPU, PACED_ADDED, PACED_BEHIND),
    ),
    Replies(
        "tools",
        "16 clients, each reply after a tool call",
        clients=16,
        asks=10,
        script='[[tool=calculator {"expression":"6*7"}]]',
        reply="The tool said: 42",
        baseline=False,
    ),
    LongSessions(
        "long_sessions",
        "sessions of 10 and 10,000 messages",
        short=10,
        long=10_000,
        sessions=2,
        turns=15,
        goals=(LONG,),
    ),
    Watchers("watchers_1000", "1,000 idle watchers", watchers=1_000, sessions=1_000),
    Watchers(
        "watchers_5000",
        "5,000 idle watchers",
        watchers=5_000,
        sessions=1_000,
        goals=(WATCHER_MEMORY, WATCHER_CPU, WATCHER_EVENT),
    ),
)


class UnknownScenario(Exception):
    """No scenario has this name; the message lists those there are."""


def select(names: Sequence[str], *, quick: bool) -> list[Scenario]:
    """Returns the named scenarios, or all; in a quick selection those that have a quick form, in it.

    Raises:
        UnknownScenario: A name is none of a scenario.
    """
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            raise UnknownScenario(f"{name!r} is no scenario; there are {', '.join(known)}")
    chosen = [scenario for scenario in SCENARIOS if not names or scenario.name in names]
    return [_quick(one) for one in chosen if one.quick is not None or names] if quick else chosen


def _quick(scenario: Scenario) -> Scenario:
    if isinstance(scenario, Replies) and scenario.quick is not None:
        return replace(scenario, asks=scenario.quick, tokens=min(scenario.tokens, 200))
    return scenario
