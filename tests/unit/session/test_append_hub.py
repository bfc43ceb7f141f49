"""Who the hub takes for a run's writer."""

from __future__ import annotations

from typing import Any, cast

from meshkit.ids import uuid7
from meshkit.tasks import TaskOwner
from services.session.append_hub import AppendHub
from services.session.domain import LeaseRef

RUN = uuid7()


def hub() -> AppendHub:
    unused = cast(Any, None)
    return AppendHub(
        unused, unused, tasks=TaskOwner("test"), guard=unused, reachable=lambda: True, dispatch=lambda: None
    )


def lease(fence: int) -> LeaseRef:
    return LeaseRef(run_id=RUN, session_id=uuid7(), fence=fence)


async def test_a_writer_that_attaches_to_a_stream_that_broke_leaves_nobody_behind() -> None:
    made = hub()
    old, new = made.open(), made.open()
    made.attach(old, str(RUN), lease(1))
    assert made.holds(RUN)
    made.close(new)
    made.attach(new, str(RUN), lease(2))
    assert not made.holds(RUN)
    assert not old.held


async def test_an_older_writer_takes_nothing_from_a_newer_one() -> None:
    made = hub()
    old, new = made.open(), made.open()
    made.attach(new, str(RUN), lease(2))
    made.attach(old, str(RUN), lease(1))
    assert str(RUN) in new.held
    assert not old.held
