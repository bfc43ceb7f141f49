"""Clients as applications write them: one key a message, tried again until it is answered, streams cut and
taken up again by cursor. Whatever they see goes into the history."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count

from tests.chaos.model.history import Recorder, digest
from tests.chaos.traffic.transport import (
    DECISIONS,
    Broken,
    Event,
    Item,
    Malformed,
    Reconnect,
    Refused,
    Transport,
)
from tests.chaos.traffic.work import CROWDED, CUT, Work, draw, large

TERMINAL = frozenset({"run.completed", "run.failed", "run.cancelled"})
_FIRST_PAUSE = 0.05
_MAX_PAUSE = 1.0
# A person takes a moment to decide.
_THINKING = 0.3


@dataclass
class Reader:
    """What one client has of one run, whatever streams it came by."""

    run: str
    last: int = 0
    over: bool = False
    text: list[tuple[int, str]] = field(default_factory=list)
    reply: str | None = None
    status: str = ""
    sum: str = ""
    calls: int = 0

    def take(self, event: Event) -> None:
        """Takes an event in; text as a reader shows it."""
        self.last = event.seq
        if event.type == "text.delta":
            self.text.append((event.seq, str(event.data["text"])))
        elif event.type == "tool.call":
            self.calls += 1
            if self.sum not in event.text:
                raise Malformed(f"a call's arguments are not as the model wrote them: {event.text[:300]}")
        elif event.type == "attempt.reset":
            self.text = [piece for piece in self.text if piece[0] < event.data["from_seq"]]
        elif event.type == "message.completed":
            self.reply = "".join(text for _, text in self.text)
            self.text = []
            if self.reply != event.data["content"]:
                raise Malformed(
                    f"the deltas say {self.reply[-80:]!r}, the message {event.data['content'][-80:]!r}"
                )
        elif event.type in TERMINAL:
            self.over = True
            self.status = event.type


class Client:
    """One client: a session, message after message until told to stop, each followed to its end.

    Args:
        name: in the history.
        transport: its way in.
        rng: what it draws from.
        recorder: the episode's history.
        stopping: set when no more messages are to be sent.
        on_session: told of the session it made.
        on_run: told of (session, run) once accepted.
        megabytes: of tools' results in each of its runs, one after the other; 0 for what is drawn.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        rng: random.Random,
        recorder: Recorder,
        stopping: asyncio.Event,
        on_session: Callable[[str], None],
        on_run: Callable[[str, str], None],
        megabytes: float = 0.0,
    ) -> None:
        self.name = name
        self._transport = transport
        self._rng = rng
        self._recorder = recorder
        self._stopping = stopping
        self._on_session = on_session
        self._on_run = on_run
        self._megabytes = megabytes
        self._numbers = count(1)
        self._streams = count(1)
        self._resolved: set[tuple[str, int]] = set()

    async def run(self) -> None:
        """Works until told to stop, and then until everything that was sent is answered."""
        try:
            session = await self._insist(
                lambda: self._transport.create_session(f"{self.name}-session"), "", "create_session"
            )
            self._write("session", session=session)
            self._on_session(session)
            while not self._stopping.is_set():
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._message(session, crowded=False))
                    if not self._megabytes and self._rng.random() < CROWDED:
                        await asyncio.sleep(self._rng.uniform(0.05, 0.6))
                        # Several at once: of these the later ones find some that wait.
                        for _ in range(self._rng.choice((1, 1, 2, 3))):
                            group.create_task(self._message(session, crowded=True))
        finally:
            await self._transport.close()

    def _write(self, kind: str, **fields: object) -> None:
        self._recorder.write(kind, client=self.name, **fields)

    async def _pause(self, tries: int, after: float = 0.0) -> None:
        bound = min(_MAX_PAUSE, _FIRST_PAUSE * 2**tries)
        await asyncio.sleep(max(min(after, _MAX_PAUSE), self._rng.uniform(bound / 2, bound)))

    async def _insist(self, call: Callable[[], Awaitable[str]], key: str, where: str) -> str:
        """Makes a call until it is answered; a refusal that no other try helps against is raised."""
        for tries in count():
            try:
                return await call()
            except Refused as refused:
                if not refused.retryable:
                    raise
                await self._pause(tries, refused.after)
            except Broken:
                await self._pause(tries)
            except Malformed as malformed:
                self._write("error", where=where, detail=str(malformed), key=key)
                await self._pause(tries)
        raise AssertionError

    # one message

    async def _message(self, session: str, *, crowded: bool) -> None:
        number = next(self._numbers)
        name = f"{self.name}-{number}"
        megabytes = self._megabytes
        work = large(megabytes, name) if megabytes else draw(self._rng, name, crowded=crowded)
        key = f"{self.name}-{number}"
        reader = await self._accepted(session, work, key)
        if reader is None:
            return
        if work.cancel_after and not reader.over and reader.last >= work.cancel_after:
            await self._cancel(reader.run)
        await self._follow(reader, work)
        words = (reader.reply or "").split()
        if work.words and reader.status == "run.completed" and words != [f"t{n}" for n in range(work.words)]:
            self._write(
                "error", where="reply", detail=f"{len(words)} words of {work.words}: {reader.reply!r}"
            )
        if work.calls and reader.status == "run.completed" and reader.calls != work.calls:
            self._write("error", where="reply", detail=f"{reader.calls} calls of {work.calls}")

    async def _accepted(self, session: str, work: Work, key: str) -> Reader | None:
        """Submits until it is accepted, or refused for good."""
        for attempt in count(1):
            self._write(
                "submit",
                key=key,
                session=session,
                digest=digest(work.text),
                policy=work.policy,
                attempt=attempt,
            )
            try:
                if work.stream:
                    return await self._run(session, work, key)
                run = await self._transport.submit(session, work.text, key, work.policy)
                self._accept(key, session, run, 202)
                return Reader(run, sum=work.sum)
            except Refused as refused:
                self._write(
                    "refused",
                    key=key,
                    session=session,
                    status=refused.status,
                    reason=refused.reason,
                    retryable=refused.retryable,
                )
                if not refused.retryable:
                    return None
                await self._pause(attempt, refused.after)
            except Broken:
                await self._pause(attempt)
            except Malformed as malformed:
                self._write("error", where="submit", detail=str(malformed), key=key)
                await self._pause(attempt)
        raise AssertionError

    def _accept(self, key: str, session: str, run: str, status: int) -> None:
        self._write("accepted", key=key, session=session, run=run, status=status, duplicate=False)
        self._on_run(session, run)

    async def _run(self, session: str, work: Work, key: str) -> Reader:
        """Submits and reads on the same call, as far as that goes; raises if not even accepted."""
        reader = Reader("", sum=work.sum)
        stream = f"{self.name}-s{next(self._streams)}"
        items = self._transport.run(session, work.text, key, work.policy)

        async def opened() -> AsyncIterator[Item]:
            async with aclosing(items) as source:  # type: ignore[type-var]
                async for item in source:
                    if isinstance(item, Event) and not reader.run:
                        reader.run = item.run
                        self._accept(key, session, item.run, 200)
                        self._write("open", stream=stream, via=self._transport.via, run=item.run, after=0)
                    yield item

        try:
            await self._read(reader, stream, opened(), work)
        except (Refused, Broken, Malformed):
            if not reader.run:
                raise
        if not reader.run:
            raise Broken("the stream ended before anything was accepted")
        return reader

    # following

    async def _follow(self, reader: Reader, work: Work) -> None:
        """Reads a run to its terminal event, over as many streams as it takes."""
        for tries in count():
            if reader.over:
                return
            stream = f"{self.name}-s{next(self._streams)}"
            self._write("open", stream=stream, via=self._transport.via, run=reader.run, after=reader.last)
            before = reader.last
            try:
                await self._read(reader, stream, self._transport.watch(reader.run, reader.last), work)
            except Refused as refused:
                if not refused.retryable:
                    self._write("error", where="watch", detail=str(refused), run=reader.run)
                    return
            except (Broken, Malformed):
                pass
            if not reader.over:
                await self._pause(0 if reader.last > before else tries)

    async def _read(self, reader: Reader, stream: str, items: AsyncIterator[Item], work: Work) -> None:
        """Reads one stream to its end and says how it ended."""
        cut_after = self._rng.randint(1, 15) if self._rng.random() < CUT else 0
        seen = 0
        reason = "broken"
        try:
            async with aclosing(items) as source:  # type: ignore[type-var]
                async for item in source:
                    if isinstance(item, Reconnect):
                        reason = "reconnect"
                        continue
                    seen += 1
                    self._write(
                        "event",
                        stream=stream,
                        run=item.run,
                        seq=item.seq,
                        type=item.type,
                        digest=digest(item.text),
                    )
                    reader.take(item)
                    if reader.over:
                        reason = "terminal"
                    elif work.cancel_after and item.seq == work.cancel_after:
                        await self._cancel(reader.run)
                    elif item.type == "action.required":
                        await self._resolve(reader.run, str(item.data["call_id"]), item.seq)
                    if cut_after and seen >= cut_after and not reader.over:
                        reason = "cut"
                        return
        except Malformed as malformed:
            self._write("error", where="stream", detail=str(malformed), run=reader.run)
            raise
        finally:
            # A call that was refused, or never answered, was no stream.
            if reader.run:
                self._write("closed", stream=stream, reason=reason)

    async def _cancel(self, run: str) -> None:
        async def call() -> str:
            await self._transport.cancel(run)
            return "accepted"

        try:
            status = await self._insist(call, "", "cancel")
        except Refused as refused:
            status = refused.reason
        self._write("cancel", run=run, status=status)

    async def _resolve(self, run: str, call_id: str, seq: int) -> None:
        """Decides about a call that waits, once however often the question is read.

        A call that was to run again may become a question again: another event, and another word.
        """
        if (call_id, seq) in self._resolved:
            return
        self._resolved.add((call_id, seq))
        await asyncio.sleep(self._rng.uniform(0, _THINKING))
        decision = self._rng.choices(DECISIONS, weights=[4, 2, 3, 1])[0]
        key = f"{self.name}-{call_id}-{seq}"

        async def call() -> str:
            await self._transport.resolve(run, call_id, decision, "a person says so", key)
            return "accepted"

        # Before it is known whether it was taken: it may have been, even if no answer ever comes.
        self._write("resolve", run=run, call=call_id, decision=decision, status="asked")
        try:
            status = await self._insist(call, key, "resolve")
        except Refused as refused:
            status = refused.reason
        self._write("resolve", run=run, call=call_id, decision=decision, status=status)
