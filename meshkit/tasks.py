"""Owned background tasks: whoever starts one ends it."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog

from meshkit.context import deadline_var

T = TypeVar("T")

_log = structlog.get_logger("meshkit.tasks")


class TaskOwner:
    """Owns background tasks that outlive the call which starts them.

    Unlike `asyncio.TaskGroup`, one task's failure is logged and leaves its siblings alone; leaving the block
    cancels what still runs and waits for it no longer than `deadline`.

    Example:
        async with TaskOwner("agent") as owner:
            owner.start(execute(run_id), name=f"run-{run_id}")
    """

    def __init__(
        self,
        name: str = "tasks",
        *,
        deadline: float = 5.0,
        on_failure: Callable[[asyncio.Task[Any], BaseException], None] | None = None,
    ) -> None:
        """Makes an owner with no tasks.

        Args:
            name: Prefix of the tasks' names in logs.
            deadline: Seconds to wait for cancelled tasks at exit.
            on_failure: Called with a task and its exception after that was logged.
        """
        self._name = name
        self._deadline = deadline
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        """Returns how many tasks are running."""
        return len(self._tasks)

    @property
    def tasks(self) -> frozenset[asyncio.Task[Any]]:
        """The tasks that are running now."""
        return frozenset(self._tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def start(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Starts a task that this owner ends.

        It inherits identity, request id and trace of the caller, but not the RPC's deadline: background work
        does not end because the call that began it does.

        Raises:
            RuntimeError: The owner is closed.
        """
        if self._closed:
            coroutine.close()
            raise RuntimeError(f"{self._name} is closed and starts no {name}")
        context = contextvars.copy_context()
        context.run(deadline_var.set, None)
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}/{name}", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        _log.error("background task failed", task=task.get_name(), exc_info=error)
        if self._on_failure is not None:
            self._on_failure(task, error)

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until no task runs; returns False if some still do after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while self._tasks:
            left = end - loop.time()
            if left <= 0:
                return False
            await asyncio.wait(self._tasks, timeout=left)
        return True

    async def close(self) -> None:
        """Cancels all tasks and waits for them, at most `deadline` seconds. Starts nothing afterwards."""
        self._closed = True
        me = asyncio.current_task()
        pending = {task for task in self._tasks if task is not me}
        for task in pending:
            task.cancel(f"{self._name} is closing")
        if not pending:
            return
        _, late = await asyncio.wait(pending, timeout=self._deadline)
        for task in late:
            _log.error(
                "background task ignored its cancellation", task=task.get_name(), after_s=self._deadline
            )


class Backoff:
    """Exponential waits with jitter, for loops that try again.

    Half of each wait is random, which spreads replicas that failed together.
    """

    def __init__(
        self,
        first: float = 0.1,
        limit: float = 5.0,
        factor: float = 2.0,
        *,
        jitter: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        """Sets the waits: `first` seconds, times `factor` each, up to `limit`."""
        if not 0 < first <= limit or factor < 1:
            raise ValueError("a backoff needs 0 < first <= limit and factor >= 1")
        self._first = first
        self._limit = limit
        self._factor = factor
        self._jitter = jitter
        self._random = rng if rng is not None else random.Random()  # noqa: S311 -- spreads load, keeps no secret
        self._next = first
        self.attempts = 0

    def next(self) -> float:
        """Returns the seconds to wait now, and lengthens the next wait."""
        ceiling = self._next
        self._next = min(self._limit, self._next * self._factor)
        self.attempts += 1
        return self._random.uniform(ceiling / 2, ceiling) if self._jitter else ceiling

    def reset(self) -> None:
        """Starts again from the first wait: call it after a success."""
        self._next = self._first
        self.attempts = 0

    async def sleep(self) -> None:
        """Waits for `next()` seconds."""
        await asyncio.sleep(self.next())
