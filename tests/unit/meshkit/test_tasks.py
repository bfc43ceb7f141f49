import asyncio
import random
import time

import pytest
import structlog

from meshkit import tasks
from meshkit.context import deadline_var, remaining, request_id_var
from meshkit.tasks import Backoff, TaskOwner


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> structlog.testing.LogCapture:
    capture = structlog.testing.LogCapture()
    monkeypatch.setattr(tasks, "_log", structlog.wrap_logger(None, processors=[capture]))
    return capture


async def test_leaving_cancels_what_still_runs() -> None:
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with TaskOwner("t") as owner:
        task = owner.start(forever(), name="forever")
        await asyncio.sleep(0)
        assert len(owner) == 1
        assert task.get_name() == "t/forever"
    assert ended.is_set()
    assert task.cancelled()
    assert not owner.tasks


async def test_one_failure_is_logged_and_leaves_the_others_alone(
    logged: structlog.testing.LogCapture,
) -> None:
    failures = []
    go = asyncio.Event()

    async def fail() -> None:
        raise KeyError("x")

    async def wait() -> str:
        await go.wait()
        return "done"

    async with TaskOwner("t", on_failure=lambda task, error: failures.append((task, error))) as owner:
        bad = owner.start(fail(), name="bad")
        good = owner.start(wait(), name="good")
        await asyncio.wait({bad})
        go.set()
        assert await good == "done"
    assert [type(error) for _, error in failures] == [KeyError]
    assert logged.entries[0]["task"] == "t/bad"
    assert logged.entries[0]["log_level"] == "error"


async def test_a_closed_owner_starts_nothing() -> None:
    owner = TaskOwner("t")
    await owner.close()

    async def never() -> None:
        raise AssertionError

    with pytest.raises(RuntimeError, match="closed"):
        owner.start(never(), name="late")


async def test_a_task_that_ignores_its_end_is_not_waited_for_long(
    logged: structlog.testing.LogCapture,
) -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    owner = TaskOwner("t", deadline=0.05)
    task = owner.start(stubborn(), name="stubborn")
    await asyncio.sleep(0)
    await owner.close()
    assert any("ignored" in entry["event"] for entry in logged.entries)
    release.set()
    await task


async def test_tasks_keep_the_request_but_not_its_deadline() -> None:
    seen: dict[str, object] = {}

    async def look() -> None:
        seen["request"] = request_id_var.get()
        seen["remaining"] = remaining()

    request, deadline = request_id_var.set("r-1"), deadline_var.set(time.monotonic() + 1)
    async with TaskOwner("t") as owner:
        await owner.start(look(), name="look")
    assert remaining() is not None
    request_id_var.reset(request)
    deadline_var.reset(deadline)
    assert seen == {"request": "r-1", "remaining": None}


async def test_wait_idle_tells_whether_all_ended() -> None:
    go = asyncio.Event()
    async with TaskOwner("t") as owner:
        owner.start(_wait(go), name="w")
        assert not await owner.wait_idle(0.01)
        go.set()
        assert await owner.wait_idle(5)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def test_an_owner_may_be_closed_by_its_own_task() -> None:
    owner = TaskOwner("t")

    async def close() -> None:
        await owner.close()

    await owner.start(close(), name="close")
    assert len(owner) == 0


def test_backoff_grows_to_its_limit_and_starts_again() -> None:
    backoff = Backoff(0.1, 1.0, 2.0, jitter=False)
    assert [backoff.next() for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.attempts == 6
    backoff.reset()
    assert (backoff.next(), backoff.attempts) == (0.1, 1)


def test_backoff_jitter_stays_in_the_upper_half() -> None:
    backoff = Backoff(1.0, 1.0, rng=random.Random(7))
    waits = [backoff.next() for _ in range(200)]
    assert all(0.5 <= wait <= 1.0 for wait in waits)
    assert max(waits) - min(waits) > 0.3


@pytest.mark.parametrize("arguments", [(0, 1, 2), (2, 1, 2), (1, 2, 0.5)])
def test_backoff_refuses_nonsense(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="backoff"):
        Backoff(*arguments)


async def test_backoff_sleeps() -> None:
    backoff = Backoff(0.001, 0.001)
    await backoff.sleep()
    assert backoff.attempts == 1
