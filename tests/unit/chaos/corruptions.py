"""Ways to spoil a clean history into one that no correct mesh leaves; a way that does not fit it skips it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from tests.chaos.model.history import Record
from tests.chaos.validate import Facts
from tests.chaos.validate.facts import NON_IDEMPOTENT, TERMINAL
from tests.unit.chaos.support import drop, of
from tests.unit.chaos.world import World

# Spoils a history and returns the invariant that must be found broken, or None if there was nothing to spoil.
Corruption = Callable[[World, Random], int | None]
ALL: list[Corruption] = []
T = TypeVar("T")


def corruption(function: Corruption) -> Corruption:
    ALL.append(function)
    return function


def pick(random: Random, records: Sequence[T]) -> T | None:
    return random.choice(records) if records else None


def facts(world: World) -> Facts:
    return Facts(world.history())


def streams(world: World) -> list[list[Record]]:
    found: dict[str, list[Record]] = {}
    for event in of(world, "event"):
        found.setdefault(event["stream"], []).append(event)
    return list(found.values())


def insert_after(world: World, record: Record, new: Record) -> None:
    place = next(i for i, one in enumerate(world.records) if one is record)
    world.records.insert(place + 1, new)


# clients


@corruption
def drop_an_event(world: World, random: Random) -> int | None:
    events = pick(random, [events for events in streams(world) if len(events) > 1])
    if events is None:
        return None
    drop(world, random.choice(events[:-1]))
    return 6


@corruption
def drop_the_last_event(world: World, random: Random) -> int | None:
    complete = {closed["stream"] for closed in of(world, "closed", reason="terminal")}
    events = pick(random, [events for events in streams(world) if events[0]["stream"] in complete])
    if events is None:
        return None
    drop(world, events[-1])
    return 6


@corruption
def repeat_an_event(world: World, random: Random) -> int | None:
    event = pick(random, of(world, "event"))
    if event is None:
        return None
    insert_after(world, event, dict(event))
    return 6


@corruption
def swap_events(world: World, random: Random) -> int | None:
    events = pick(random, [events for events in streams(world) if len(events) > 1])
    if events is None:
        return None
    place = random.randrange(len(events) - 1)
    one, other = events[place : place + 2]
    for name in ("seq", "type", "digest"):
        one[name], other[name] = other[name], one[name]
    return 6


@corruption
def change_an_event(world: World, random: Random) -> int | None:
    event = pick(random, of(world, "event"))
    if event is None:
        return None
    event["digest"] = "f" * 16
    return 6


@corruption
def invent_an_event(world: World, random: Random) -> int | None:
    events = pick(random, [e for e in streams(world) if e[-1]["seq"] == facts(world).last_seq(e[-1]["run"])])
    if events is None:
        return None
    insert_after(world, events[-1], events[-1] | {"seq": events[-1]["seq"] + 1})
    return 6


@corruption
def lead_a_client_past_an_event(world: World, random: Random) -> int | None:
    events = pick(random, streams(world))
    if events is None:
        return None
    (opened,) = of(world, "open", stream=events[0]["stream"])
    got = of(world, "event", client=opened["client"], run=events[0]["run"])
    earlier = [event["seq"] for event in got if event["t"] < opened["t"]]
    if not earlier:
        return None
    have = max(earlier)
    opened["after"] = have + 1
    drop(world, *[event for event in events if event["seq"] <= have + 1])
    return 6


@corruption
def end_a_stream_too_soon(world: World, random: Random) -> int | None:
    known = facts(world)
    last = {events[0]["stream"]: events[-1] for events in streams(world)}
    closed = pick(
        random,
        [
            closed
            for closed in of(world, "closed")
            if closed["reason"] != "terminal"
            and closed["stream"] in last
            and last[closed["stream"]]["seq"] != known.last_seq(last[closed["stream"]]["run"])
        ],
    )
    if closed is None:
        return None
    closed["reason"] = "terminal"
    return 6


@corruption
def show_an_error(world: World, random: Random) -> int | None:
    error = {"t": 1.0, "n": 0, "kind": "error", "client": "ada", "where": "GET /v1/runs", "detail": "500"}
    world.records.insert(random.randrange(len(world.records)), error)
    return 10


@corruption
def break_a_stream_in_a_drain(world: World, random: Random) -> int | None:
    drains = of(world, "drain", phase="begin")
    faults = [fault["t"] for fault in of(world, "fault")]
    calm = [drain for drain in drains if not any(abs(t - drain["t"]) < 20 for t in faults)]
    drain, closed = pick(random, calm), pick(random, of(world, "closed"))
    if drain is None or closed is None:
        return None
    closed.update(reason="broken", t=drain["t"])
    return 10


# the log


@corruption
def drop_an_entry(world: World, random: Random) -> int | None:
    entry = pick(random, of(world, "log"))
    assert entry is not None
    drop(world, entry)
    return 8


@corruption
def repeat_an_entry(world: World, random: Random) -> int | None:
    entry = pick(random, of(world, "log"))
    assert entry is not None
    world.records.append(dict(entry))
    return 8


@corruption
def change_an_entry_that_was_seen(world: World, random: Random) -> int | None:
    seen = {(event["run"], event["seq"]) for event in of(world, "event")}
    entry = pick(random, [e for e in of(world, "log") if (e["run"], e["seq"]) in seen])
    if entry is None:
        return None
    entry["digest"] = "f" * 16
    return 6


@corruption
def end_a_run_twice(world: World, random: Random) -> int | None:
    entry = pick(random, [e for e in of(world, "log") if e["seq"] > 1 and e["type"] not in TERMINAL])
    if entry is None or not facts(world).over(entry["run"]):
        return None
    entry["type"] = "run.failed"
    return 6


# fences


def own(world: World, *, held: bool = False) -> list[Record]:
    """Entries under a fence that was granted for their own run, maybe to an owner."""
    granted = {(grant["run"], grant["fence"]) for grant in of(world, "grant") if grant["owner"] or not held}
    return [entry for entry in of(world, "log") if (entry["run"], entry["fence"]) in granted]


@corruption
def lower_the_fence_of_an_entry(world: World, random: Random) -> int | None:
    entry = pick(random, own(world, held=True))
    if entry is None:
        return None
    entry["fence"] -= random.randint(1, entry["fence"])
    return 3


@corruption
def raise_the_fence_of_an_entry(world: World, random: Random) -> int | None:
    entry = pick(random, own(world))
    if entry is None:
        return None
    entry["fence"] += 1
    return 3


@corruption
def grant_a_fence_twice(world: World, random: Random) -> int | None:
    grant = pick(random, of(world, "grant"))
    if grant is None:
        return None
    grant["fence"] -= 1
    return 2


@corruption
def forget_a_grant(world: World, random: Random) -> int | None:
    grant = pick(random, of(world, "grant"))
    if grant is None:
        return None
    drop(world, grant)
    return 2


@corruption
def set_a_grant_back(world: World, random: Random) -> int | None:
    """The new owner is to write again what is written."""
    known = facts(world)
    grant = pick(
        random, [g for g in of(world, "grant") if g["owner"] and not g["attach"] and g["next_seq"] > 2]
    )
    if grant is None:
        return None
    grant["next_seq"] = 1
    assert known.log[grant["run"]][0]["fence"] < grant["fence"]
    return 3


@corruption
def let_a_lease_go_on(world: World, random: Random) -> int | None:
    lease = pick(random, [lease for lease in of(world, "lease_row") if lease["run"] is not None])
    if lease is None:
        return None
    name, value = random.choice([("owner", "agent-9"), ("next_seq", lease["next_seq"] + 1)])
    lease[name] = value
    return 3


# Redis


@corruption
def change_what_redis_has(world: World, random: Random) -> int | None:
    live = pick(random, of(world, "live"))
    if live is None:
        return None
    live["digest"] = "f" * 16
    return 7


@corruption
def publish_what_is_not_committed(world: World, random: Random) -> int | None:
    live = pick(random, of(world, "live"))
    if live is None:
        return None
    world.records.append(live | {"seq": facts(world).last_seq(live["run"]) + 1})
    return 7


@corruption
def raise_a_fence_in_redis(world: World, random: Random) -> int | None:
    live = pick(random, of(world, "live_fence"))
    if live is None:
        return None
    live["fence"] += 100
    return 3


# messages and keys


@corruption
def lose_a_run(world: World, random: Random) -> int | None:
    answer = pick(random, of(world, "accepted"))
    assert answer is not None
    drop(world, *of(world, "run_row", run=answer["run"]))
    return 1


@corruption
def lose_a_message(world: World, random: Random) -> int | None:
    message = pick(random, [m for m in of(world, "message") if m["role"] in ("user", "assistant")])
    if message is None:
        return None
    drop(world, message)
    return 1


@corruption
def repeat_a_message(world: World, random: Random) -> int | None:
    message = pick(random, [m for m in of(world, "message") if m["role"] in ("user", "assistant")])
    if message is None:
        return None
    world.records.append(message | {"message": "message-again", "ordinal": message["ordinal"] + 1000})
    return 1


@corruption
def change_an_input(world: World, random: Random) -> int | None:
    message = pick(random, of(world, "message", role="user"))
    if message is None:
        return None
    message["digest"] = "f" * 16
    return 1


@corruption
def swap_messages(world: World, random: Random) -> int | None:
    kept = [message for message in of(world, "message") if not message["rolled_back"]]
    pairs = [
        (one, other)
        for one in kept
        for other in kept
        if one["session"] == other["session"]
        and one["ordinal"] < other["ordinal"]
        and one["run"] != other["run"]
    ]
    pair = pick(random, pairs)
    if pair is None:
        return None
    one, other = pair
    one["ordinal"], other["ordinal"] = other["ordinal"], one["ordinal"]
    return 1


@corruption
def roll_a_message_back(world: World, random: Random) -> int | None:
    called_off = {row["run"] for row in of(world, "run_row", cancel_requested=True)}
    message = pick(random, [message for message in of(world, "message") if message["run"] not in called_off])
    if message is None:
        return None
    message["rolled_back"] = True
    return 1


@corruption
def swap_turns(world: World, random: Random) -> int | None:
    """Two runs change places, the second of which was sent once the first was acknowledged."""
    rows = [row for row in of(world, "run_row") if of(world, "accepted", run=row["run"])]
    pairs = [
        (a, b) for a in rows for b in rows if a["session"] == b["session"] and a["ordinal"] < b["ordinal"]
    ]
    pair = pick(random, pairs)
    if pair is None:
        return None
    one, other = pair
    one["ordinal"], other["ordinal"] = other["ordinal"], one["ordinal"]
    sent = min(
        record["t"] for record in of(world, "submit", key=of(world, "key_row", run=other["run"])[0]["key"])
    )
    return 1 if of(world, "accepted", run=one["run"])[0]["t"] < sent else None


@corruption
def answer_with_another_run(world: World, random: Random) -> int | None:
    answers = of(world, "accepted")
    answer = pick(random, answers)
    others = [other for other in answers if answer is not None and other["run"] != answer["run"]]
    other = pick(random, others)
    if answer is None or other is None:
        return None
    answer["run"] = other["run"]
    return 9


@corruption
def forget_a_key(world: World, random: Random) -> int | None:
    row = pick(random, of(world, "key_row"))
    assert row is not None
    drop(world, row)
    return 9


# tool calls


@corruption
def act_once_more(world: World, random: Random) -> int | None:
    """Only where every act that a person allowed was made."""
    known = facts(world)
    call = pick(
        random,
        [
            call
            for call, acts in known.acts.items()
            if known.effect(call) == NON_IDEMPOTENT and len(acts) == 1 + len(known.word(call, "retry"))
        ],
    )
    if call is None:
        return None
    world.records.append(dict(known.acts[call][-1]))
    return 4


@corruption
def act_with_another_key(world: World, random: Random) -> int | None:
    act = pick(random, of(world, "act", effect="idempotent"))
    if act is None:
        return None
    act["key"] = "another"
    return 5


@corruption
def complete_without_an_act(world: World, random: Random) -> int | None:
    known = facts(world)
    row = pick(
        random,
        [
            row
            for row in of(world, "call_row", state=3)
            if row["effect"] > 1 and not known.word(row["call"], "completed")
        ],
    )
    if row is None:
        return None
    drop(world, *known.acts[row["call"]])
    return 4


@corruption
def act_without_a_begin(world: World, random: Random) -> int | None:
    act = pick(random, of(world, "act"))
    if act is None:
        return None
    act["t"] = 1.0
    return 4


@corruption
def act_for_nobody(world: World, random: Random) -> int | None:
    act = pick(random, of(world, "act"))
    if act is None:
        return None
    act["call"] = "nobody:1:0"
    return 4


@corruption
def forget_a_move(world: World, random: Random) -> int | None:
    move = pick(random, [move for move in of(world, "call") if move["from"] != move["to"]])
    if move is None:
        return None
    drop(world, move)
    return 4


@corruption
def begin_under_a_stale_fence(world: World, random: Random) -> int | None:
    move = pick(random, of(world, "call", to=2))
    if move is None:
        return None
    # Before any fence of its claim.
    move["fence"] = 0
    return 3


@corruption
def forget_a_word(world: World, random: Random) -> int | None:
    """A call acted, and again on the word of a person that nobody can find."""
    known = facts(world)
    word = pick(
        random,
        [
            word
            for word in of(world, "resolve", decision="retry")
            if known.effect(word["call"]) == NON_IDEMPOTENT
            and len(known.acts.get(word["call"], [])) == 1 + len(known.word(word["call"], "retry"))
        ],
    )
    if word is None:
        return None
    drop(world, word)
    return 4


# runs


@corruption
def get_stuck(world: World, random: Random) -> int | None:
    row = pick(random, of(world, "run_row"))
    assert row is not None
    row["status"] = random.choice((1, 2))
    return 8


@corruption
def end_in_another_way(world: World, random: Random) -> int | None:
    row = pick(random, [row for row in of(world, "run_row") if row["status"] != 3])
    if row is None:
        return None
    row["status"] = random.choice([status for status in (3, 4, 5, 6) if status != row["status"]])
    return 8


@corruption
def miscount_a_log(world: World, random: Random) -> int | None:
    row = pick(random, of(world, "run_row"))
    assert row is not None
    row["last_seq"] += random.choice((-1, 1))
    return 8


@corruption
def wait_without_a_word(world: World, random: Random) -> int | None:
    row = pick(random, of(world, "run_row", status=3))
    if row is None:
        return None
    for entry in of(world, "log", run=row["run"], type="action.required"):
        entry["type"] = "tool.progress"
    return 8


@corruption
def cancel_by_itself(world: World, random: Random) -> int | None:
    known = facts(world)
    row = pick(
        random,
        [
            row
            for row in of(world, "run_row", status=6)
            if not known.came_with(row, "interrupt", "rollback")
            and not of(world, "resolve", run=row["run"], decision="abandon")
        ],
    )
    if row is None:
        return None
    drop(world, *of(world, "cancel", run=row["run"]))
    return 8


@corruption
def give_up(world: World, _: Random) -> int | None:
    of(world, "end")[0]["settled"] = False
    return 8
