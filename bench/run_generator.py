"""An open load of runs, over gRPC or HTTP: each begins when it is due, whatever became of those before it.

    python -m bench.run_generator JOB

JOB is JSON: `target` is host:port of the agents, or the URL of gateways (`authority` is then the file of the
certificate that is trusted); `watch` where runs are followed whose stream broke, `key` an API key, `runs` a
list of {"at", "session", "prompt"} with `at` in seconds from the beginning; `out` is where the records go,
`patience` how many seconds a run may take. The talk over stdin and stdout is that of `bench.generator`. It
writes `OUT.json`: for each run `due` and `ended` in nanoseconds of the monotonic clock, the agent `replica`
that began it, its `text`, how often its stream was opened again (`reconnects`), `error`.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import orjson
import uvloop

from bench.generator import timed
from bench.sse_client import BadAnswer, Chunk, post_stream
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
                    self.take(event.run_id, event.seq, event.type, event.data)
        except grpc.aio.AioRpcError as error:
            if not self.run_id or error.code() not in PASSING:
                self.run_id, self.failed = "", f"{error.code().name}: {error.details()}"
        finally:
            call.cancel()

    async def read_sse(self, chunks: AsyncIterator[Chunk]) -> None:
        """Reads an event stream of HTTP to its end; one that breaks has failed."""
        rest = b""
        try:
            async for chunk in chunks:
                *lines, rest = (rest + chunk.body).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: ") and b'"seq"' in line:
                        event = orjson.loads(line[6:])
                        data = orjson.dumps(event["data"]).decode()
                        self.take(event["run_id"], event["seq"], event["type"], data)
        except (OSError, BadAnswer, TimeoutError) as error:
            self.failed = f"{type(error).__name__}: {error}"

    def take(self, run_id: str, seq: int, kind: str, data: str) -> None:
        """Takes an event; `data` is JSON."""
        self.run_id, self.seq = run_id, seq
        if kind == "run.started":
            # Where it began; another attempt may be elsewhere.
            self._record["replica"] = self._record["replica"] or orjson.loads(data)["replica"]
        elif kind == "text.delta":
            self._texts[seq] = orjson.loads(data)["text"]
        elif kind == "attempt.reset":
            first = orjson.loads(data)["from_seq"]
            self._texts = {seq: text for seq, text in self._texts.items() if seq < first}
        elif kind in TERMINAL:
            self._record["ended"] = time.monotonic_ns()
            if kind != "run.completed":
                self.failed = f"{kind}: {data}"


class Generator:
    """Begins runs and keeps what became of them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._runs = job["runs"]
        self._patience = job["patience"]
        self._key = f"Bearer {job['key']}"
        self._url = job["target"] if "://" in job["target"] else ""
        self._tls = ssl.create_default_context(cafile=job["authority"]) if job.get("authority") else None
        # Channels of the same options would share one connection.
        self._channels = [
            grpc.aio.insecure_channel(job["target"], options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(0 if self._url else CHANNELS)
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
                group.create_task(self._one(number, run, record))

    async def _one(self, number: int, run: dict[str, Any], record: dict[str, Any]) -> None:
        reading = Reading(record)
        try:
            async with asyncio.timeout(self._patience):
                if self._url:
                    await self._by_http(run, reading)
                else:
                    await self._by_grpc(self._stubs[number % CHANNELS], run, reading, record)
        except TimeoutError:
            record["error"] = f"no end within {self._patience:.0f} s"
        record["text"] = reading.text
        if reading.failed or not record["ended"]:
            record["error"] = record["error"] or reading.failed or "the run did not begin"

    async def _by_http(self, run: dict[str, Any], reading: Reading) -> None:
        body = {"input": run["prompt"], "stream": True, "options": {"memory": False}}
        url = f"{self._url}/v1/sessions/{run['session']}/runs"
        await reading.read_sse(post_stream(url, body, {"Authorization": self._key}, self._tls))

    async def _by_grpc(
        self, stub: Any, run: dict[str, Any], reading: Reading, record: dict[str, Any]
    ) -> None:
        metadata = (("authorization", self._key), (SESSION_KEY, run["session"]))
        request = RunRequest(
            session_id=run["session"],
            input=[InputMessage(role="user", content=run["prompt"])],
            options=RunOptions(memory=False),
        )
        await reading.read(stub.Run(request, metadata=metadata))
        while not record["ended"] and reading.run_id:
            record["reconnects"] += 1
            await asyncio.sleep(RECONNECT_SECONDS)
            again = WatchRunRequest(run_id=reading.run_id, after_seq=reading.seq)
            await reading.read(self._watch.WatchRun(again, metadata=metadata))

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
