"""An open load of runs over gRPC: each begins when it is due, whatever became of those before it.

    python -m bench.run_generator JOB

JOB is JSON: `target` is host:port of the agents, `watch` where runs are followed whose stream broke, `key` an
API key, `runs` a list of {"at", "session", "prompt"} with `at` in seconds from the beginning; `out` is where
the records go, `patience` how many seconds a run may take. The talk over stdin and stdout is that of
`bench.generator`. It writes `OUT.json`: for each run `due` and `ended` in nanoseconds of the monotonic clock,
the agent `replica` that began it, its `text`, how often its stream was opened again (`reconnects`), `error`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import orjson
import uvloop

from bench.generator import timed
from hermesh.agent.v1.agent_service_pb2 import RunRequest
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1.resources_pb2 import RunOptions
from hermesh.session.v1.session_service_pb2 import WatchRunRequest
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from meshkit.channel import SESSION_KEY

TERMINAL = frozenset({"run.completed", "run.failed", "run.cancelled"})
CHANNELS = 4
LEAD_SECONDS = 0.2
RECONNECT_SECONDS = 0.05
# What a stream may break with while its run goes on.
PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
    }
)


class Reading:
    """What of a run was read so far; a stream that breaks is taken up again where it was."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record
        self._texts: dict[int, str] = {}
        self.run_id = ""
        self.seq = 0
        self.failed = ""

    @property
    def text(self) -> str:
        """The run's text, without what was taken back."""
        return "".join(self._texts.values())

    async def read(self, call: Any) -> None:
        """Reads a stream to its end, or until it breaks."""
        try:
            async for response in call:
                for event in response.frame.events:
                    self._event(event)
        except grpc.aio.AioRpcError as error:
            if not self.run_id or error.code() not in PASSING:
                self.run_id, self.failed = "", f"{error.code().name}: {error.details()}"
        finally:
            call.cancel()

    def _event(self, event: Any) -> None:
        self.run_id, self.seq = event.run_id, event.seq
        if event.type == "run.started":
            # Where it began; another attempt may be elsewhere.
            self._record["replica"] = self._record["replica"] or orjson.loads(event.data)["replica"]
        elif event.type == "text.delta":
            self._texts[event.seq] = orjson.loads(event.data)["text"]
        elif event.type == "attempt.reset":
            first = orjson.loads(event.data)["from_seq"]
            self._texts = {seq: text for seq, text in self._texts.items() if seq < first}
        elif event.type in TERMINAL:
            self._record["ended"] = time.monotonic_ns()
            if event.type != "run.completed":
                self.failed = f"{event.type}: {event.data}"


class Generator:
    """Begins runs and keeps what became of them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._runs = job["runs"]
        self._patience = job["patience"]
        self._key = f"Bearer {job['key']}"
        # Channels of the same options would share one connection.
        self._channels = [
            grpc.aio.insecure_channel(job["target"], options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(CHANNELS)
        ]
        self._stubs: list[Any] = [AgentServiceStub(channel) for channel in self._channels]
        self._back = grpc.aio.insecure_channel(job["watch"])
        self._watch: Any = SessionServiceStub(self._back)
        self.records: list[dict[str, Any]] = []

    async def connect(self) -> None:
        """Opens the connections."""
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def play(self, began: int) -> None:
        """Begins each run when it is due; returns when all have ended."""
        async with asyncio.TaskGroup() as group:
            for number, run in enumerate(self._runs):
                due = began + round((run["at"] + LEAD_SECONDS) * 1e9)
                await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
                record = {"due": due, "ended": 0, "replica": "", "text": "", "error": "", "reconnects": 0}
                self.records.append(record)
                group.create_task(self._one(self._stubs[number % CHANNELS], run, record))

    async def _one(self, stub: Any, run: dict[str, Any], record: dict[str, Any]) -> None:
        metadata = (("authorization", self._key), (SESSION_KEY, run["session"]))
        request = RunRequest(
            session_id=run["session"],
            input=[InputMessage(role="user", content=run["prompt"])],
            options=RunOptions(memory=False),
        )
        reading = Reading(record)
        try:
            async with asyncio.timeout(self._patience):
                await reading.read(stub.Run(request, metadata=metadata))
                while not record["ended"] and reading.run_id:
                    record["reconnects"] += 1
                    await asyncio.sleep(RECONNECT_SECONDS)
                    again = WatchRunRequest(run_id=reading.run_id, after_seq=reading.seq)
                    await reading.read(self._watch.WatchRun(again, metadata=metadata))
        except TimeoutError:
            record["error"] = f"no end within {self._patience:.0f} s"
        record["text"] = reading.text
        if reading.failed or not record["ended"]:
            record["error"] = record["error"] or reading.failed or "the run did not begin"

    async def close(self) -> None:
        """Closes the connections."""
        for channel in (*self._channels, self._back):
            await channel.close()


async def run(job: dict[str, Any]) -> None:
    """Plays one job."""
    generator = Generator(job)
    await generator.connect()
    await timed(generator.play)
    await generator.close()
    Path(job["out"]).with_suffix(".json").write_bytes(orjson.dumps(generator.records))


def main() -> None:
    """Reads the job and plays it."""
    uvloop.run(run(orjson.loads(Path(sys.argv[1]).read_bytes())))


if __name__ == "__main__":
    main()
