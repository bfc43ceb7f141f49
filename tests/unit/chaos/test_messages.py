"""Invariants 1 and 9: what was acknowledged is kept, once and in order; one key makes one run."""

from __future__ import annotations

import pytest

from tests.unit.chaos.support import assert_clean, assert_found, drop, of
from tests.unit.chaos.world import World


@pytest.fixture
def world() -> World:
    """Two runs of one session, the second of which was sent twice."""
    world = World()
    session = world.session()
    first = world.whole(world.submit(session))
    second = world.submit(session)
    world.again(second)
    world.whole(second)
    world.watch(first)
    assert_clean(world)
    return world


# what passes


def test_input_that_nobody_acknowledged_may_be_there_or_not() -> None:
    world = World()
    session = world.session()
    world.whole(world.submit(session, answered=False))
    world.whole(world.submit(session))
    world.lose(session)
    assert_clean(world)


def test_a_refusal_that_asks_to_come_again_may_hide_an_acceptance() -> None:
    world = World()
    session = world.session()
    run = world.whole(world.submit(session, answered=False))
    world.note(
        "refused",
        client="ada",
        key=run.key,
        session=session.name,
        status=429,
        reason="OVERLOADED",
        retryable=True,
    )
    world.again(run)
    world.refuse(session, status=409, reason="SESSION_BUSY")
    assert_clean(world)


def test_input_that_ended_while_it_waited_joins_the_conversation_at_its_turn() -> None:
    world = World()
    session = world.session()
    first = world.submit(session)
    waiting = world.submit(session)
    world.claim(first)
    world.cancel(waiting)
    assert [message["run"] for message in session.messages] == [first.name]
    world.finish(first)
    assert of(world, "message", run=waiting.name)
    assert_clean(world)


def test_a_rollback_drops_what_the_run_said_and_heard() -> None:
    world = World()
    session = world.session()
    world.whole(world.submit(session))
    dropped = world.submit(session)
    world.claim(dropped)
    world.tool(dropped)
    next_run = world.submit(session, policy="rollback")
    world.finish(dropped, "run.cancelled")
    world.whole(next_run)
    assert len(of(world, "message", rolled_back=True)) == 3
    assert_clean(world)


def test_two_inputs_that_crossed_may_take_their_turns_in_any_order() -> None:
    world = World()
    session = world.session()
    one = world.whole(world.submit(session))
    other = world.whole(world.submit(session))
    # The second was sent at the very moment in which the first was acknowledged.
    sent = of(world, "submit", key=other.key)[0]
    sent["t"] = of(world, "accepted", key=one.key)[0]["t"]
    one_row, other_row = of(world, "run_row", run=one.name)[0], of(world, "run_row", run=other.name)[0]
    assert one_row["ordinal"] < other_row["ordinal"]
    assert_clean(world)


# what must not


def test_an_acknowledged_run_that_is_lost(world: World) -> None:
    drop(world, *of(world, "run_row", run=world.runs[0].name))
    assert_found(world, 1, "is lost")


def test_everything_of_an_acknowledged_input_is_lost(world: World) -> None:
    run = world.runs[1]
    drop(world, *of(world, "key_row", key=run.key))
    for kind in ("run_row", "log", "message", "grant"):
        drop(world, *of(world, kind, run=run.name))
    assert_found(world, 1, "is lost")
    assert_found(world, 9, "PostgreSQL does not know it")


def test_an_acknowledged_run_of_another_session(world: World) -> None:
    of(world, "accepted")[0]["session"] = "session-of-another"
    assert_found(world, 1, "another session")


def test_nothing_was_acknowledged(world: World) -> None:
    drop(world, *of(world, "accepted"))
    assert_found(world, 1, "proves nothing")


def test_a_run_that_is_there_twice(world: World) -> None:
    world.records.append(dict(of(world, "run_row")[0]))
    assert_found(world, 1, "is there 2 times")


def test_a_log_without_its_beginning(world: World) -> None:
    drop(world, *of(world, "log", seq=1, run=world.runs[0].name))
    assert_found(world, 1, "has no run.created")


def test_a_log_that_begins_twice(world: World) -> None:
    of(world, "log", seq=2, run=world.runs[0].name)[0]["type"] = "run.created"
    assert_found(world, 1, "was created 2 times")


def test_a_log_that_begins_with_something_else(world: World) -> None:
    first, second = (of(world, "log", seq=seq, run=world.runs[0].name)[0] for seq in (1, 2))
    first["type"], second["type"] = second["type"], first["type"]
    assert_found(world, 1, "does not begin with run.created")


def test_an_input_that_was_interrupted_while_it_waited_and_is_forgotten() -> None:
    world = World()
    session = world.session()
    first = world.submit(session)
    world.claim(first)
    waiting = world.submit(session, policy="interrupt")
    last = world.submit(session, policy="interrupt")
    world.finish(first, "run.cancelled")
    world.whole(last)
    assert_clean(world)
    drop(world, *of(world, "message", run=waiting.name))
    for place, message in enumerate(of(world, "message"), start=1):
        message["ordinal"] = place
    assert_found(world, 1, f"the input of run {waiting.name} is not in the conversation")


def test_a_rollback_leaves_nothing_of_what_waited() -> None:
    world = World()
    session = world.session()
    first = world.submit(session)
    world.claim(first)
    waiting = world.submit(session)
    last = world.submit(session, policy="rollback")
    world.finish(first, "run.cancelled")
    world.whole(last)
    assert not of(world, "message", run=waiting.name)
    assert_clean(world)


def test_an_input_that_is_not_in_the_conversation(world: World) -> None:
    drop(world, *of(world, "message", role="user", run=world.runs[1].name))
    assert_found(world, 1, "is not in the conversation")


def test_an_input_that_is_in_the_conversation_twice(world: World) -> None:
    said = of(world, "message", role="user", run=world.runs[1].name)[0]
    world.records.append(said | {"message": "message-again", "ordinal": 5})
    assert_found(world, 1, "2 times")


def test_an_input_that_was_changed(world: World) -> None:
    of(world, "message", role="user")[0]["digest"] = "0" * 16
    assert_found(world, 1, "not what was submitted")


def test_an_input_that_nobody_acknowledged_and_that_was_changed() -> None:
    world = World()
    session = world.session()
    world.whole(world.submit(session))
    run = world.whole(world.submit(session, answered=False))
    assert_clean(world)
    of(world, "message", role="user", run=run.name)[0]["digest"] = "0" * 16
    assert_found(world, 1, "not what was submitted")


def test_the_inputs_of_two_runs_that_changed_places(world: World) -> None:
    one, other = (of(world, "message", role="user", run=run.name)[0] for run in world.runs)
    one["digest"], other["digest"] = other["digest"], one["digest"]
    assert_found(world, 1, "not what was submitted")


def test_a_reply_that_was_told_and_not_kept(world: World) -> None:
    drop(world, *of(world, "message", role="assistant", run=world.runs[1].name))
    assert_found(world, 1, "told of 1 replies, the conversation has 0")


def test_a_reply_that_is_kept_twice(world: World) -> None:
    reply = of(world, "message", role="assistant", run=world.runs[1].name)[0]
    world.records.append(reply | {"message": "message-again", "ordinal": 5})
    assert_found(world, 1, "the conversation has 2")


def test_runs_with_a_gap_in_their_numbers(world: World) -> None:
    of(world, "run_row", ordinal=2)[0]["ordinal"] = 3
    assert_found(world, 1, "are not numbered 1 to 2")


def test_two_runs_with_one_number(world: World) -> None:
    of(world, "run_row", ordinal=2)[0]["ordinal"] = 1
    assert_found(world, 1, "are not numbered 1 to 2")


def test_a_turn_before_that_of_what_was_acknowledged_earlier(world: World) -> None:
    one, other = (of(world, "run_row", run=run.name)[0] for run in world.runs)
    one["ordinal"], other["ordinal"] = other["ordinal"], one["ordinal"]
    assert_found(world, 1, "goes before it")


def test_messages_with_a_gap_in_their_numbers(world: World) -> None:
    of(world, "message", ordinal=4)[0]["ordinal"] = 5
    assert_found(world, 1, "are not numbered 1 to 4")


def test_two_messages_with_one_number(world: World) -> None:
    of(world, "message", ordinal=4)[0]["ordinal"] = 3
    assert_found(world, 1, "are not numbered 1 to 4")


def test_a_message_that_is_there_twice(world: World) -> None:
    of(world, "message", ordinal=4)[0]["message"] = of(world, "message", ordinal=3)[0]["message"]
    assert_found(world, 1, "is there 2 times")


def test_messages_out_of_the_order_of_the_runs(world: World) -> None:
    second, third = (of(world, "message", ordinal=ordinal)[0] for ordinal in (2, 3))
    second["ordinal"], third["ordinal"] = 3, 2
    assert_found(world, 1, "not in the order of its runs")


def test_an_input_after_its_reply(world: World) -> None:
    first, second = (of(world, "message", ordinal=ordinal)[0] for ordinal in (1, 2))
    first["ordinal"], second["ordinal"] = 2, 1
    assert_found(world, 1, "comes after its replies")


def test_a_message_of_a_foreign_session(world: World) -> None:
    message = of(world, "message", ordinal=4)[0]
    message["session"] = "session-of-another"
    assert_found(world, 1, "is of no run of its session")


def rolled_back(world: World, run: int) -> None:
    for message in of(world, "message", run=world.runs[run].name):
        message["rolled_back"] = True
    kept = of(world, "message", rolled_back=False)
    for ordinal, message in enumerate(kept, start=1):
        message["ordinal"] = ordinal


def test_a_rollback_that_nobody_wished(world: World) -> None:
    rolled_back(world, 0)
    assert_found(world, 1, "nobody wished it")


def test_a_rollback_of_the_run_that_asked_for_it(world: World) -> None:
    for submit in of(world, "submit", key=world.runs[1].key):
        submit["policy"] = "rollback"
    assert_clean(world)
    rolled_back(world, 1)
    assert_found(world, 1, "nobody wished it")


def test_a_rollback_before_the_run_has_ended() -> None:
    world = World()
    session = world.session()
    dropped = world.submit(session)
    world.claim(dropped)
    next_run = world.submit(session, policy="rollback")
    world.finish(dropped, "run.cancelled")
    world.whole(next_run)
    assert_clean(world)
    of(world, "run_row", run=dropped.name)[0]["status"] = 2
    assert_found(world, 1, "before it ended")


def test_half_a_rollback() -> None:
    world = World()
    session = world.session()
    dropped = world.submit(session)
    world.claim(dropped)
    world.tool(dropped)
    next_run = world.submit(session, policy="rollback")
    world.finish(dropped, "run.cancelled")
    world.whole(next_run)
    assert_clean(world)
    of(world, "message", role="tool")[0].update(rolled_back=False, ordinal=3)
    assert_found(world, 1, "and others not")


def test_what_was_refused_for_good_and_made_a_run() -> None:
    world = World()
    session = world.session()
    world.whole(world.submit(session))
    run = world.whole(world.submit(session, answered=False))
    refusal = {"client": "ada", "key": run.key, "session": session.name, "status": 409, "retryable": False}
    world.note("refused", reason="SESSION_BUSY", **refusal)
    world.history()
    assert_found(world, 1, "refused for good")


# one key


def test_a_key_that_was_answered_with_two_runs(world: World) -> None:
    of(world, "accepted", key=world.runs[1].key)[1]["run"] = world.runs[0].name
    assert_found(world, 9, "was answered with 2 runs")


def test_a_key_that_made_another_run_than_it_was_answered_with(world: World) -> None:
    of(world, "key_row", key=world.runs[0].key)[0]["run"] = world.runs[1].name
    assert_found(world, 9, "another run than it made")


def test_a_key_that_made_two_runs() -> None:
    """The second attempt made a run of its own, and its answer was lost."""
    world = World()
    session = world.session()
    first = world.whole(world.submit(session))
    second = world.whole(world.submit(session, answered=False))
    assert_clean(world)
    of(world, "key_row", run=second.name)[0]["key"] = first.key
    assert_found(world, 9, "made 2 runs")


def test_a_run_that_no_key_made(world: World) -> None:
    """A repeated submission forgot to look for its key."""
    session = world.sessions[0]
    run = world.runs[0]
    world.records.append(of(world, "run_row", run=run.name)[0] | {"run": "run-again", "ordinal": 3})
    assert session.name == of(world, "run_row", run="run-again")[0]["session"]
    assert_found(world, 9, "was made by no key")


def test_an_acknowledged_key_that_postgresql_does_not_know(world: World) -> None:
    drop(world, *of(world, "key_row", key=world.runs[0].key))
    assert_found(world, 9, "PostgreSQL does not know it")


def test_a_key_whose_run_is_not_there() -> None:
    world = World()
    world.whole(world.submit(world.session()))
    world.history()
    world.note("submit", client="ada", key="key-x", session="s", digest="", policy="enqueue", attempt=1)
    world.note("key_row", key="key-x", run="run-x")
    assert_found(world, 9, "is not there")


def test_a_key_that_nobody_submitted(world: World) -> None:
    drop(world, *of(world, "submit", key=world.runs[0].key))
    assert_found(world, 9, "nobody submitted it")


def test_two_keys_with_one_run(world: World) -> None:
    """Another client's input was taken for a repetition."""
    of(world, "accepted", key=world.runs[0].key)[0]["run"] = world.runs[1].name
    assert_found(world, 9, "was given to 2 keys")
