"""Following a run or a session: what is stored, then live, without a gap or a duplicate.

A watcher's cursor is the seq it sent last. Live events that follow it are sent, older ones are dropped, and
anything else sends the watcher to PostgreSQL for the page after its cursor. So what it sends is a prefix of
the stored log whatever the live tail loses, repeats or reorders. It reads at the pace of its client: while
the client does not take a batch, nothing is fetched and at most one bounded queue is kept.
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from uuid import UUID

from meshkit.errors import InvalidArgumentError, NotFoundError, OutOfRangeError, UnavailableError
from meshkit.tasks import Backoff
from services.session import metrics
from services.session.domain import Event, Page, Run, Session
from services.session.store.port import PAGE_BYTES
from services.session.tail import Tail

_PAGE = 200
_MAX_FRAME_EVENTS = 200
_MAX_FRAME_BYTES = 512 * 1024
# A watcher that heard nothing for so long reads PostgreSQL once: no wait here relies on anybody else. It is
# long, because `Tail.look` asks for all of them together each second.
_IDLE_S = 120.0
_PATIENCE_S = 15.0

T = TypeVar("T")


class Logbook(Protocol):
    """The part of the store that watching needs; see `store.port`."""

    async def get_session(self, tenant_id: UUID, session_id: UUID) -> Session:
        """Returns a session."""
        ...

    async def get_run(self, tenant_id: UUID, run_id: UUID) -> Run:
        """Returns a run."""
        ...

    async def list_runs(
        self, tenant_id: UUID, session_id: UUID, *, page_size: int, page_token: str
    ) -> Page[Run]:
        """Lists runs, newest first."""
        ...

    async def runs_from(self, tenant_id: UUID, session_id: UUID, ordinal: int, limit: int) -> list[Run]:
        """Returns runs from an ordinal on."""
        ...

    async def events_after(self, tenant_id: UUID, run_id: UUID, seq: int, limit: int) -> list[Event]:
        """Returns events past a seq."""
        ...

    async def heads(self, run_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Returns the last seq of each run's log."""
        ...


@dataclass(frozen=True, slots=True)
class Moved:
    """The stream ends although the log does not."""

    reason: str


Batch = Sequence[Event] | Moved


class Watcher:
    """Follows runs and sessions for one tenant."""

    def __init__(
        self,
        store: Logbook,
        tail: Tail,
        tenant_id: UUID,
        check: Callable[[UUID], None] = lambda _tenant_id: None,
    ) -> None:
        """Makes a watcher; it keeps nothing between calls.

        Args:
            store: Where logs are.
            tail: What is committed now.
            tenant_id: Whose logs.
            check: Raises what a watch is to end with, once this tenant may not be followed here any more.
        """
        self._check_tenant = check
        self._store = store
        self._tail = tail
        self._tenant_id = tenant_id

    async def run(
        self, run_id: UUID, after_seq: int, *, opened: Callable[[], None] | None = None
    ) -> AsyncGenerator[Batch]:
        """Yields a run's events past `after_seq` until its terminal one.

        `opened` is called once it is known that this may be watched.

        Raises:
            NotFoundError: No such run.
            OutOfRangeError: The cursor is past the end, or older than what is kept.
            UnavailableError: TENANT_MOVED: another cell has it now.
        """
        self._check_tenant(self._tenant_id)
        run = await self._store.get_run(self._tenant_id, run_id)
        await self._check_cursor(run, after_seq)
        if opened is not None:
            opened()
        with metrics.watchers.labels("run").track_inprogress():
            async with aclosing(self._follow(run, after_seq)) as batches:
                async for batch in batches:
                    yield batch

    async def session(
        self,
        session_id: UUID,
        after_run_id: UUID | None,
        after_seq: int,
        *,
        only_new: bool,
        opened: Callable[[], None] | None = None,
    ) -> AsyncGenerator[Batch]:
        """Yields a session's events run by run, each to its terminal one, without end.

        `opened` is called once it is known that this may be watched.

        Raises:
            NotFoundError: No such session, or the cursor's run is not in it.
            OutOfRangeError: The cursor is past the end, or older than what is kept.
            InvalidArgumentError: The cursor has a seq but no run.
        """
        await self._store.get_session(self._tenant_id, session_id)
        with metrics.watchers.labels("session").track_inprogress():
            with self._tail.wait_for_runs(session_id) as waiter:
                waiter.tenant_id = self._tenant_id
                ordinal, cursor = await self._start(session_id, after_run_id, after_seq, only_new)
                if opened is not None:
                    opened()
                while True:
                    self._check_tenant(self._tenant_id)
                    runs = await _patiently(self._store.runs_from, self._tenant_id, session_id, ordinal, 1)
                    for run in runs:
                        async with aclosing(self._follow(run, cursor)) as batches:
                            async for batch in batches:
                                yield batch
                                if isinstance(batch, Moved):
                                    return
                        ordinal, cursor = run.ordinal + 1, 0
                        break
                    else:
                        if waiter.draining:
                            yield Moved("drain")
                            return
                        waiter.ordinal = ordinal - 1
                        await waiter.wait(_IDLE_S)
                        # A session that was deleted ends its watches.
                        await _patiently(self._store.get_session, self._tenant_id, session_id)

    async def _start(
        self, session_id: UUID, after_run_id: UUID | None, after_seq: int, only_new: bool
    ) -> tuple[int, int]:
        """Returns the ordinal of the run to begin with, and the seq after which."""
        if after_run_id is not None:
            run = await self._store.get_run(self._tenant_id, after_run_id)
            if run.session_id != session_id:
                raise NotFoundError(
                    "RUN_NOT_FOUND",
                    "no such run in this session",
                    metadata={"run_id": str(after_run_id)},
                )
            await self._check_cursor(run, after_seq)
            return run.ordinal, after_seq
        if after_seq:
            raise InvalidArgumentError("INVALID_ARGUMENT", "after_seq needs after_run_id")
        if not only_new:
            return 1, 0
        newest: Run | None = None
        at_work: Run | None = None
        token = ""
        while True:
            page = await self._store.list_runs(self._tenant_id, session_id, page_size=50, page_token=token)
            for run in page.items:
                newest = newest or run
                if not run.status.terminal:
                    at_work = run
            token = page.next_page_token
            # Runs wait in line behind the one at work; the next event is that one's. One that waits may be
            # cancelled: further back than a page whose last run has ended nothing is at work.
            if not token or page.items[-1].status.terminal:
                break
        if at_work is not None:
            return await self._now(at_work)
        return (newest.ordinal + 1 if newest is not None else 1), 0

    async def _now(self, run: Run) -> tuple[int, int]:
        return run.ordinal, (await self._store.heads([run.run_id])).get(run.run_id, 0)

    async def _check_cursor(self, run: Run, after_seq: int) -> None:
        if after_seq <= run.last_seq:
            return
        last_seq = (await self._store.heads([run.run_id])).get(run.run_id, run.last_seq)
        if after_seq > last_seq:
            raise OutOfRangeError(
                "CURSOR_PAST_END",
                f"after_seq is {after_seq} but the run's last event is {last_seq}",
                metadata={"last_seq": str(last_seq)},
            )

    async def _follow(self, run: Run, cursor: int) -> AsyncGenerator[Batch]:
        """Yields batches past `cursor` until the terminal event, or `Moved`."""
        run_id = run.run_id
        if run.status.terminal and cursor and cursor >= run.last_seq:
            return
        with self._tail.subscribe(run.session_id, run_id, cursor, run.last_seq) as subscription:
            subscription.tenant_id = self._tenant_id
            stored = True
            while True:
                self._check_tenant(self._tenant_id)
                if stored:
                    subscription.lost = False
                    page = await _patiently(self._store.events_after, self._tenant_id, run_id, cursor, _PAGE)
                    # What has fewer characters than a quarter of a page's bytes was not cut by its size.
                    stored = len(page) == _PAGE or sum(len(event.data) for event in page) * 4 >= PAGE_BYTES
                    if not page:
                        # Raises when the run was deleted under the watch.
                        run = await _patiently(self._store.get_run, self._tenant_id, run_id)
                        if run.status.terminal and cursor >= run.last_seq:
                            return
                    batch: Sequence[Event] = page
                else:
                    live = await subscription.take(_IDLE_S)
                    batch, gap = following(live, cursor)
                    # Something is missing before what came, or nothing came for long, or too much did.
                    stored = gap or subscription.lost or not live
                for frame in frames(batch):
                    yield frame
                    cursor = subscription.position = frame[-1].seq
                    if frame[-1].terminal:
                        return
                if subscription.draining:
                    yield Moved("drain")
                    return


async def _patiently(read: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Reads for a watch that is under way: a restart of PostgreSQL is a pause and not its end.

    Raises:
        UnavailableError: PostgreSQL did not answer for as long as a client should have to wait.
    """
    backoff = Backoff(first=0.1, limit=1.0)
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return await read(*arguments)
        except UnavailableError:
            if time.monotonic() > end:
                raise
            await backoff.sleep()


def following(events: Sequence[Event], cursor: int) -> tuple[list[Event], bool]:
    """Returns those events that follow `cursor` without a gap, each once, and whether a gap was met."""
    found: list[Event] = []
    for event in events:
        if event.seq == cursor + 1:
            found.append(event)
            cursor += 1
        elif event.seq > cursor:
            return found, True
    return found, False


def frames(events: Sequence[Event]) -> list[Sequence[Event]]:
    """Splits a batch into frames of bounded size."""
    size = sum(len(event.data) for event in events)
    if size <= _MAX_FRAME_BYTES and len(events) <= _MAX_FRAME_EVENTS:
        return [events] if events else []
    found: list[Sequence[Event]] = []
    current: list[Event] = []
    size = 0
    for event in events:
        if current and (size + len(event.data) > _MAX_FRAME_BYTES or len(current) >= _MAX_FRAME_EVENTS):
            found.append(current)
            current, size = [], 0
        current.append(event)
        size += len(event.data)
    found.append(current)
    return found
