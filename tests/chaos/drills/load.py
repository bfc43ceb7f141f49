"""Many clients, each in a session of its own, each with one run after another over SSE.

A client behaves as docs/http-api.md asks of one: it sends input with an Idempotency-Key, comes back by cursor
after a `reconnect` frame, and after an error too, so that one error does not hide the next. What it notes is
what a user would: errors, gaps, duplicates, how long nothing came.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import httpx

from bench.mesh import Mesh
from tests.chaos.drills.sse import Broken, Frame, Over, stream

TERMINAL = {"run.completed", "run.failed", "run.cancelled"}
PAUSE_SECONDS = 0.2
# A run whose next event does not come for so long is stuck.
STUCK_SECONDS = 60.0

Addresses = Callable[[], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Script:
    """What a client's runs are: so many words at so many a second, and with `tool` a call and its result.

    With `watched` the client leaves the stream that began a run, and watches the run.
    """

    tokens: int
    rate: int
    tool: bool = False
    watched: bool = False

    @property
    def text(self) -> str:
        """What to say to the scripted model."""
        call = '[[tool=calculator {"expression":"2+2"}]]' if self.tool else ""
        return f"[[tokens={self.tokens} rate={self.rate}]] {call}"

    @property
    def words(self) -> int:
        """How many words the whole reply has; "The tool said: 4" among them."""
        return self.tokens + (4 if self.tool else 0)


@dataclass(slots=True)
class Run:
    """One run as its client saw it.

    Attributes:
        script: what it is.
        session_id: whose run it is; empty until it is sent.
        text: what was sent: no other run's is the same.
        run_id: empty until its first event came: until then it is not acknowledged.
        seq: the last seq that came.
        words: the reply so far, as (seq, text); an `attempt.reset` discards from its `from_seq` on.
        attempts: (replica, when its first event was here, when it was written) of each try, in order.
        ended: its terminal event; empty while it goes on.
        arrivals: when each batch of events came, by the monotonic clock.
    """

    script: Script
    session_id: str = ""
    text: str = ""
    run_id: str = ""
    seq: int = 0
    words: list[tuple[int, str]] = field(default_factory=list)
    attempts: list[tuple[str, float, float]] = field(default_factory=list)
    ended: str = ""
    arrivals: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = f"{self.script.text} {uuid.uuid4()}"

    @property
    def reply(self) -> str:
        """The reply as a reader shows it."""
        return "".join(text for _, text in self.words)


@dataclass(slots=True)
class Load:
    """What all clients saw.

    Attributes:
        errors: (when, what) of each error, streams of runs that were acknowledged.
        refused: the same for input that was not acknowledged yet; it was sent again with its key.
        wrong: gaps, duplicates, replies that are not whole.
        reconnects: how often a client was asked to come back and did.
    """

    mesh: Mesh
    addresses: Addresses
    runs: list[Run] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    refused: list[tuple[float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    reconnects: int = 0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _turn: itertools.count[int] = field(default_factory=itertools.count)

    # What came of it

    @property
    def takeovers(self) -> int:
        """How often a run got another agent."""
        return sum(max(0, len(run.attempts) - 1) for run in self.runs)

    @property
    def completed(self) -> int:
        """How many runs ended well."""
        return sum(run.ended == "run.completed" for run in self.runs)

    def waits(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between two events of a run at its client, for those that ended in this time, sorted."""
        return sorted(
            later - earlier
            for run in self.runs
            for earlier, later in itertools.pairwise(run.arrivals)
            if start <= later < end
        )

    # The clients

    async def flowing(self, streams: int, seconds: float = 60.0) -> None:
        """Returns once this many replies flow."""
        async with asyncio.timeout(seconds):
            while sum(bool(run.words) and not run.ended for run in self.runs) < streams:
                await asyncio.sleep(0.05)

    async def client(self, session_id: str, script: Script) -> None:
        """One client: run after run, until the load is to stop and the last one has ended."""
        while not self.stopping.is_set():
            run = Run(script)
            self.runs.append(run)
            await self.follow(session_id, run)

    async def follow(self, session_id: str, run: Run) -> None:
        """Sends input and follows its run to the end, over however many connections."""
        run.session_id = session_id
        key = str(uuid.uuid4())
        headers = dict(self.mesh.headers)
        since = time.monotonic()
        while not run.ended:
            addresses = self.addresses()
            address = addresses[next(self._turn) % len(addresses)]
            before = run.seq
            leaves = run.script.watched and not run.run_id
            if not run.run_id:
                path, body = f"/v1/sessions/{session_id}/runs", {"input": run.text, "stream": True}
                answer = stream(address, "POST", path, headers | {"Idempotency-Key": key}, body)
            else:
                cursor = {"Last-Event-ID": f"{run.run_id}:{run.seq}"}
                answer = stream(address, "GET", f"/v1/runs/{run.run_id}/events", headers | cursor)
            try:
                async with aclosing(answer) as frames:
                    await self._read(run, frames, leaves=leaves)
            except Over:
                self.wrong.append(f"{run.run_id}: 204 after {run.seq}, before the terminal event came")
                return
            except Broken as error:
                (self.errors if run.run_id else self.refused).append((time.monotonic(), str(error)))
                await asyncio.sleep(PAUSE_SECONDS)
            if run.seq > before:
                since = time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                self.wrong.append(f"{run.run_id or 'a submission'}: stuck after seq {run.seq}")
                return
        said, wanted = len(run.reply.split()), run.script.words
        if run.ended == "run.completed" and said != wanted:
            self.wrong.append(f"{run.run_id}: {said} words in place of {wanted}")

    async def _read(self, run: Run, frames: AsyncIterator[Frame], *, leaves: bool) -> None:
        async for frame in frames:
            if frame.kind == "reconnect":
                if not run.run_id:
                    raise Broken("a reconnect before the first event: there is no cursor to come back with")
                self.reconnects += 1
                return
            if not frame.seq:
                continue
            self._take(run, frame)
            if run.ended or leaves:
                return
        raise Broken("the stream ended without a terminal event or a reconnect")

    def _take(self, run: Run, frame: Frame) -> None:
        run.run_id = run.run_id or frame.run_id
        if frame.run_id != run.run_id or frame.seq != run.seq + 1:
            self.wrong.append(f"{run.run_id}: {frame.run_id}:{frame.seq} came after seq {run.seq}")
        run.seq = frame.seq
        if not run.arrivals or run.arrivals[-1] != frame.at:
            run.arrivals.append(frame.at)
        match frame.kind:
            case "text.delta":
                run.words.append((frame.seq, str(frame.data["text"])))
            case "attempt.reset":
                first = int(str(frame.data["from_seq"]))
                run.words = [word for word in run.words if word[0] < first]
            case "run.started":
                run.attempts.append((str(frame.data["replica"]), frame.at, frame.time))
            case kind if kind in TERMINAL:
                run.ended = kind


def through_envoy(mesh: Mesh) -> Addresses:
    """The address that clients have."""
    return lambda: [f"127.0.0.1:{mesh.http_port}"]


def at_gateways(mesh: Mesh) -> Addresses:
    """The gateways' own addresses: what is left when Envoy is what is killed."""
    found = [replica.address for replica in mesh.of("gateway")]
    return lambda: found


@asynccontextmanager
async def load(
    mesh: Mesh, streams: int, scripts: Sequence[Script], addresses: Addresses | None = None
) -> AsyncIterator[Load]:
    """Has `streams` replies flow inside the block; leaving it lets every run end.

    Args:
        mesh: where.
        streams: how many clients.
        scripts: what the clients' runs are, in turn.
        addresses: where clients connect to; Envoy if None.
    """
    found = Load(mesh, addresses or through_envoy(mesh))
    async with httpx.AsyncClient(base_url=mesh.url, headers=mesh.headers, timeout=30) as client:
        sessions = []
        for _ in range(streams):
            answer = await client.post("/v1/sessions", json={})
            answer.raise_for_status()
            sessions.append(str(answer.json()["session_id"]))
    async with asyncio.TaskGroup() as group:
        for session_id, script in zip(sessions, itertools.cycle(scripts), strict=False):
            group.create_task(found.client(session_id, script))
        try:
            await found.flowing(streams * 9 // 10)
            yield found
        finally:
            found.stopping.set()
