"""Invariants 6 and 10: what clients see is a prefix of the log, and never an error of ours."""

from __future__ import annotations

import pytest

from tests.chaos.model.history import Record
from tests.unit.chaos.support import assert_clean, assert_found, drop, of
from tests.unit.chaos.world import Run, Stream, World


@pytest.fixture
def world() -> World:
    """A client that was cut off twice, and one that came when all was over."""
    world = World()
    run = world.submit(world.session())
    posted = world.open(None)
    posted.run = run
    world.claim(run)
    world.receive(posted)
    world.append(run, "step.started", "text.delta", "text.delta")
    world.close(posted, "cut")
    second = world.open(run)
    world.receive(second, 2)
    world.fault("kill", "gateway-1")
    world.close(second, "broken")
    third = world.open(run, via="grpc")
    world.finish(run)
    world.receive(third)
    world.close(third)
    world.close(world.open(run), "none left")
    world.watch(run, "bob")
    assert_clean(world)
    return world


def events(world: World, client: str = "bob") -> list[Record]:
    return of(world, "event", client=client)


# what passes


def test_a_client_may_begin_in_the_middle_and_go_back() -> None:
    world = World()
    run = world.whole(world.submit(world.session()))
    late = world.open(run, after=3)
    world.receive(late, 2)
    world.close(late, "cut")
    world.receive(world.open(run, after=0), 4)
    last = world.open(run, after=5)
    world.receive(last)
    world.close(last)
    world.history()
    drop(world, *of(world, "end"))
    world.note("end", settled=True, seconds=1.0)
    stream = of(world, "open", after=0)[0]["stream"]
    world.records.insert(-1, of(world, "closed")[0] | {"stream": stream, "reason": "cut"})
    assert_clean(world)


def followed() -> tuple[World, Stream, list[Run]]:
    """A session that is followed over a WebSocket through two runs into a third."""
    world = World()
    session = world.session()
    runs = [world.whole(world.submit(session)) for _ in range(3)]
    stream = world.open(runs[0], via="ws", after=2)
    for run in runs:
        stream.run = run
        world.receive(stream, 5 if run is runs[2] else 1000)
        stream.cursor = 0
    world.close(stream, "cut")
    assert_clean(world)
    return world, stream, runs


def test_a_session_may_be_followed_run_by_run() -> None:
    followed()


def test_a_session_may_be_followed_from_where_it_stands() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    stream = world.open(None, via="ws")
    world.finish(run)
    stream.run, stream.cursor = run, 2
    world.receive(stream)
    world.close(stream, "cut")
    assert_clean(world)


# one stream


def test_an_event_that_a_client_never_got(world: World) -> None:
    drop(world, events(world)[2])
    assert_found(world, 6, "has a gap in run")


def test_the_first_event_that_a_client_never_got(world: World) -> None:
    drop(world, events(world)[0])
    assert_found(world, 6, "2 after 0")


def test_the_last_event_that_a_client_never_got(world: World) -> None:
    drop(world, events(world)[-1])
    assert_found(world, 6, "ended as complete at")


def test_an_event_that_a_client_got_twice(world: World) -> None:
    event = events(world)[2]
    world.records.insert(world.records.index(event), dict(event))
    assert_found(world, 6, "has 3 of run run-4 again after 3")


def test_events_that_changed_places(world: World) -> None:
    one, other = (world.records.index(event) for event in events(world)[2:4])
    world.records[one], world.records[other] = world.records[other], world.records[one]
    assert_found(world, 6, "has a gap")
    assert_found(world, 6, "again after")


def test_a_cursor_that_was_ignored(world: World) -> None:
    """The second stream begins anew in place of where the client was."""
    second = of(world, "open", client="ada")[1]
    first = of(world, "event", client="ada")[0]
    world.records.insert(world.records.index(second) + 1, first | {"stream": second["stream"]})
    assert_found(world, 6, "has 1 of run")


def test_a_cursor_one_too_high(world: World) -> None:
    second = of(world, "open", client="ada")[1]
    drop(world, of(world, "event", stream=second["stream"])[0])
    assert_found(world, 6, "has a gap")


@pytest.mark.parametrize(("field", "value"), [("digest", "0" * 16), ("type", "text.delta")])
def test_an_event_that_is_not_the_logs(world: World, field: str, value: str) -> None:
    events(world)[1][field] = value
    assert_found(world, 6, "has another 2 of run")


def test_an_event_that_is_not_in_the_log(world: World) -> None:
    """It was sent before it was committed, and never was."""
    last = events(world)[-1]
    world.records.insert(world.records.index(last) + 1, last | {"seq": last["seq"] + 1, "type": "text.delta"})
    assert_found(world, 6, "which is not in the log")


def test_an_event_before_its_commit(world: World) -> None:
    """It was committed after all, and nobody but its reader could have known."""
    event = events(world)[2]
    logged = of(world, "log", seq=3)[0]
    logged["committed"] = event["t"] - 1
    for other in of(world, "event", seq=3):
        other["t"] = max(other["t"], logged["committed"])
    assert_clean(world)
    logged["committed"] = event["t"] + 0.002
    assert_found(world, 6, "had 3 of run run-4 before it was committed")


def test_an_event_of_a_foreign_run(world: World) -> None:
    other = world.whole(world.submit(world.session("eve"), "eve"))
    drop(world, *[record for record in world.records if record["kind"] in ("end", "lease_row", "message")])
    drop(world, *[record for record in world.records if record["kind"] in ("log", "run_row", "key_row")])
    assert_clean(world)
    events(world)[0].update(run=other.name, digest=of(world, "log", run=other.name)[0]["digest"])
    assert_found(world, 6, "has an event of run")


def test_an_event_on_a_stream_that_is_closed(world: World) -> None:
    event = events(world)[0]
    world.records.append(dict(event))
    assert_found(world, 6, "which is not open")


def test_a_stream_that_was_opened_twice(world: World) -> None:
    of(world, "open")[1]["stream"] = of(world, "open")[0]["stream"]
    assert_found(world, 6, "was opened twice")


# over the streams of a client


def test_a_client_that_is_led_past_events(world: World) -> None:
    """The frame that told it to come back named a cursor that it had not got to."""
    third = of(world, "open", client="ada", via="grpc")[0]
    third["after"] += 1
    drop(world, of(world, "event", stream=third["stream"])[0])
    assert_found(world, 6, "goes on after")


def test_a_client_that_is_led_past_events_before_it_got_any() -> None:
    world = World()
    run = world.whole(world.submit(world.session()))
    world.close(world.open(run, after=0), "reconnect")
    second = world.open(run, after=2)
    world.receive(second)
    world.close(second)
    world.history()
    assert_found(world, 6, "goes on after 2 of run run-4, and had got as far as 0")


def test_what_one_client_has_is_nothing_to_another(world: World) -> None:
    of(world, "open", client="ada")[1]["client"] = "eve"
    assert_found(world, 6, "which is not open")


# the end of a stream


def test_a_stream_that_ended_as_complete_before_its_run(world: World) -> None:
    of(world, "closed", reason="cut")[0]["reason"] = "terminal"
    assert_found(world, 6, "ended as complete at 2")


def test_nothing_left_although_there_is(world: World) -> None:
    of(world, "open", client="ada")[-1]["after"] -= 1
    assert_found(world, 6, "ended as complete")


def test_a_client_may_stop_waiting_for_more(world: World) -> None:
    of(world, "closed", reason="broken")[0]["reason"] = "none left"
    assert_clean(world)


def test_nothing_left_of_a_run_that_has_not_ended() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    world.close(world.open(run, after=2), "none left")
    world.begin(world.call(run))
    world.park(run)
    world.history()
    assert_found(world, 6, "ended as complete at 2")
    drop(world, *of(world, "closed"))
    assert_found(world, 6, "is open at the end")


def test_a_complete_stream_of_a_run_that_waits_for_a_person() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    world.begin(world.call(run))
    world.park(run)
    world.watch(run)
    world.history()
    assert_found(world, 6, "the log did not")


def test_a_stream_that_hangs_while_the_log_goes_on(world: World) -> None:
    bob = of(world, "open", client="bob")[0]["stream"]
    drop(world, *of(world, "closed", stream=bob), *events(world)[3:])
    assert_found(world, 6, "is open at the end and lacks")


def test_a_stream_that_is_open_and_has_all_there_is(world: World) -> None:
    bob = of(world, "open", client="bob")[0]["stream"]
    drop(world, *of(world, "closed", stream=bob))
    assert_clean(world)


# the end of a run


def test_a_run_that_ends_twice(world: World) -> None:
    run = world.runs[0]
    of(world, "log", run=run.name, seq=run.last_seq - 1)[0]["type"] = "run.failed"
    assert_found(world, 6, "ends 2 times")


def test_a_run_that_goes_on_after_its_end(world: World) -> None:
    run = world.runs[0]
    last, usage = (of(world, "log", seq=seq)[0] for seq in (run.last_seq, run.last_seq - 1))
    last["type"], usage["type"] = usage["type"], last["type"]
    assert_found(world, 6, "goes on after its end")


# a session's stream


def test_a_session_of_which_a_run_was_passed_over() -> None:
    world, _, runs = followed()
    drop(world, *of(world, "event", run=runs[1].name))
    assert_found(world, 6, "out of order")


def test_a_session_of_which_a_run_came_before_the_end_of_the_one_before() -> None:
    world, _, runs = followed()
    drop(world, of(world, "event", run=runs[0].name)[-1])
    assert_found(world, 6, "out of order")


def test_a_session_of_which_the_next_run_does_not_begin_at_its_beginning() -> None:
    world, _, runs = followed()
    drop(world, of(world, "event", run=runs[1].name)[0])
    assert_found(world, 6, "has a gap")


def by_run() -> tuple[World, list[Run]]:
    """A session that is followed, each run's part as a stream of its own."""
    world = World()
    session = world.session()
    runs = [world.whole(world.submit(session)) for _ in range(3)]
    for run in runs:
        first = world.open(run, "bob")
        world.receive(first, 3)
        world.close(first, "cut")
        second = world.open(run, "bob")
        world.receive(second)
        world.close(second)
    for opened in of(world, "open"):
        opened["session"] = session.name
    assert_clean(world)
    return world, runs


def test_a_session_followed_by_run_of_which_one_was_passed_over() -> None:
    world, runs = by_run()
    gone = [opened["stream"] for opened in of(world, "open", run=runs[1].name)]
    drop(world, *[record for record in world.records if record.get("stream") in gone])
    assert_found(world, 6, "out of order")


def test_a_session_followed_by_run_of_which_one_was_left_before_its_end() -> None:
    world, runs = by_run()
    second = of(world, "open", run=runs[0].name)[1]["stream"]
    drop(world, *[record for record in world.records if record.get("stream") == second])
    assert_found(world, 6, "out of order")


# errors


def test_an_error_that_no_client_must_see(world: World) -> None:
    world.records.insert(
        0, {"t": 1.0, "n": 0, "kind": "error", "client": "ada", "where": "GET", "detail": "500"}
    )
    assert_found(world, 10, "must never see: GET: 500")


@pytest.mark.parametrize("reason", ["", None, "INTERNAL", "DATA_CORRUPT"])
def test_a_refusal_without_a_reason_of_use(world: World, reason: str | None) -> None:
    world.refuse(world.sessions[0], reason=reason or "")
    of(world, "refused")[0]["reason"] = reason
    assert_found(world, 10, "without a reason")


def drained(fault_before: float | None = None) -> tuple[World, Stream]:
    """A drain under which a client is asked to come back, maybe so many seconds after a fault."""
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    stream = world.open(run)
    if fault_before is not None:
        world.fault("kill", "gateway-1")
        world.now += fault_before - 0.25
    with world.drain("gateway"):
        world.receive(stream)
        world.close(stream, "reconnect")
        stream = world.open(run)
        world.finish(run)
        world.receive(stream)
        world.close(stream)
        world.refuse(world.sessions[0], status=429, reason="OVERLOADED")
    assert_clean(world)
    return world, stream


def test_a_drain_that_breaks_a_stream() -> None:
    world, stream = drained()
    of(world, "closed", stream=stream.name)[0]["reason"] = "broken"
    assert_found(world, 10, "broke while gateway was drained")


def test_a_drain_long_after_a_fault_that_breaks_a_stream() -> None:
    world, stream = drained(fault_before=6.0)
    of(world, "closed", stream=stream.name)[0]["reason"] = "broken"
    assert_found(world, 10, "broke while gateway was drained")


def test_a_stream_that_breaks_in_a_drain_right_after_a_fault() -> None:
    world, stream = drained(fault_before=3.0)
    of(world, "closed", stream=stream.name)[0]["reason"] = "broken"
    assert_clean(world)


def test_a_stream_that_breaks_in_a_drain_while_something_is_still_broken() -> None:
    world, stream = drained(fault_before=60.0)
    world.note("healed", fault="kill", target="gateway-1")
    of(world, "closed", stream=stream.name)[0]["reason"] = "broken"
    assert_clean(world)


def test_a_replica_that_is_told_to_stop_is_a_drain() -> None:
    world, stream = drained()
    begin = of(world, "drain", phase="begin")[0]
    drop(world, *of(world, "drain"))
    world.records.insert(0, begin | {"kind": "fault", "fault": "drain", "target": "gateway-2", "detail": ""})
    assert_clean(world)
    of(world, "closed", stream=stream.name)[0]["reason"] = "broken"
    assert_found(world, 10, "broke while gateway-2 was drained")


@pytest.mark.parametrize(("other", "excused"), [("gateway-1", True), ("agent-1", False)])
def test_two_replicas_of_a_service_that_stop_at_once_may_leave_nobody(other: str, excused: bool) -> None:
    world, stream = drained()
    begin = of(world, "drain", phase="begin")[0]
    drop(world, *of(world, "drain"))
    fault = begin | {"kind": "fault", "fault": "drain", "detail": ""}
    world.records += [fault | {"target": "gateway-2", "t": begin["t"] - 0.2}, fault | {"target": other}]
    of(world, "closed", stream=stream.name)[0]["reason"] = "broken"
    if excused:
        assert_clean(world)
    else:
        assert_found(world, 10, "was drained")


@pytest.mark.parametrize("status", [503, "UNAVAILABLE"])
def test_a_drain_in_which_input_is_refused(status: int | str) -> None:
    world, _ = drained()
    of(world, "refused")[0].update(status=status, reason="SERVICE_UNAVAILABLE")
    assert_found(world, 10, "was refused (SERVICE_UNAVAILABLE) while gateway was drained")


def test_a_drain_without_an_end_lasts() -> None:
    world, stream = drained()
    drop(world, *of(world, "drain", phase="end"))
    of(world, "closed", stream=stream.name)[0]["reason"] = "broken"
    assert_found(world, 10, "while gateway was drained")


def test_a_stream_that_breaks_before_anything_was_broken(world: World) -> None:
    of(world, "closed", reason="cut")[0]["reason"] = "broken"
    of(world, "fault")[0]["t"] += 10
    assert_found(world, 10, "before anything was broken")


def test_a_stream_that_breaks_just_before_its_fault_is_noted(world: World) -> None:
    fault = of(world, "fault")[0]
    of(world, "closed", reason="broken")[0]["t"] = fault["t"] - 1.5
    assert_clean(world)


def test_input_that_is_refused_before_anything_was_broken(world: World) -> None:
    world.refuse(world.sessions[0])
    of(world, "refused")[0]["t"] = of(world, "fault")[0]["t"] - 3
    assert_found(world, 10, "before anything was broken")
