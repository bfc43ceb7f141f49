"""Invariant 11: of a deleted session nothing comes back."""

import pytest

from tests.unit.chaos.support import assert_clean, assert_found
from tests.unit.chaos.world import World


def deleted() -> World:
    """A session that was deleted, beside one that goes on."""
    world = World()
    kept = world.submit(world.session())
    world.cancel(kept)
    world.note("delete", client="leaver", session="s", run="r")
    world.note("deleted", client="leaver", session="s", run="r")
    for what, reason in (("session", "SESSION_NOT_FOUND"), ("run", "RUN_NOT_FOUND")):
        world.note("after", client="leaver", session="s", run="r", what=what, answer=reason)
    return world


def act(world: World) -> None:
    world.note("act", tool="charge", effect="non_idempotent", call="r:1:0", key="r:1:0", run="r", pid=7)


def test_what_is_gone_and_said_to_be_gone_is_right() -> None:
    world = deleted()
    assert_clean(world)


@pytest.mark.parametrize("answer", ["found", "still open", "INTERNAL"])
def test_an_answer_about_a_deleted_session_is_found(answer: str) -> None:
    world = deleted()
    world.note("after", client="leaver", session="s", run="r", what="run", answer=answer)
    assert_found(world, 11, "its run")


def test_rows_of_a_deleted_session_are_found() -> None:
    world = deleted()
    world.note("left", session="s", what="event", rows=3)
    assert_found(world, 11, "3 rows of event")


def test_an_act_before_the_deletion_needs_no_journal_any_more() -> None:
    world = World()
    world.cancel(world.submit(world.session()))
    act(world)
    world.note("delete", client="leaver", session="s", run="r")
    world.note("deleted", client="leaver", session="s", run="r")
    assert_clean(world)


def test_acts_twice_are_found_though_the_journal_went_with_the_session() -> None:
    world = World()
    world.cancel(world.submit(world.session()))
    act(world)
    act(world)
    world.note("delete", client="leaver", session="s", run="r")
    world.note("deleted", client="leaver", session="s", run="r")
    assert_found(world, 4, "acted 2 times")


def test_an_act_after_the_deletion_is_found() -> None:
    world = deleted()
    act(world)
    assert_found(world, 11, "after its session was deleted")


@pytest.mark.parametrize(("fault", "excused"), [("freeze", True), ("network", True), ("kill", False)])
def test_only_what_can_hold_a_tool_explains_a_late_act(fault: str, excused: bool) -> None:
    world = World()
    world.cancel(world.submit(world.session()))
    world.note("fault", fault=fault, target="tool-1", detail="")
    world.note("delete", client="leaver", session="s", run="r")
    world.note("deleted", client="leaver", session="s", run="r")
    world.note("healed", fault=fault, target="tool-1")
    act(world)
    if excused:
        assert_clean(world)
    else:
        assert_found(world, 11, "after its session was deleted")


def test_what_held_a_tool_long_ago_explains_nothing() -> None:
    world = deleted()
    world.note("fault", fault="freeze", target="tool-1", detail="")
    world.note("healed", fault="freeze", target="tool-1")
    world.now += 10
    act(world)
    assert_found(world, 11, "after its session was deleted")


def test_a_call_that_is_begun_after_the_deletion_is_found_whatever_is_broken() -> None:
    world = deleted()
    world.note("fault", fault="freeze", target="tool-1", detail="")
    world.note("begun", session="s", run="r", call="r:1:0")
    assert_found(world, 11, "was begun after")
