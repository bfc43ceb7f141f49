"""An open load of runs over gRPC: each begins when it is due, whatever became of those before it.

    python -m bench.run_generator JOB

JOB is JSON: `target` is host:port, `key` an API key, `runs` a list of {"at", "session", "prompt"} with `at`
in seconds from the beginning; `out` is where the records go, `silence_seconds` how long nothing may come. The
talk over stdin and stdout is that of `bench.generator`. It writes `OUT.json`: for each run `due` and `ended`
in nanoseconds of the monotonic clock, the agent `replica` that began it, its `text`, and `error`.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import orjson
import uvloop

from bench.generator import say
from hermesh.agent.v1.agent_service_pb2 import RunRequest
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1.resources_pb2 import RunOptions
from meshkit.channel import SESSION_KEY

TERMINAL = frozenset({"run.completed", "run.failed", "run.cancelled"})
CHANNELS = 4
LEAD_SECONDS = 0.2


class Generator:
    """Begins runs and keeps what became of them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._runs = job["runs"]
        self._silence = job["silence_seconds"]
        self._key = f"Bearer {job['key']}"
        # Channels of the same options would share one connection.
        self._channels = [
            grpc.aio.insecure_channel(job["target"], options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(CHANNELS)
        ]
        self._stubs: list[Any] = [AgentServiceStub(channel) for channel in self._channels]
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
                record = {"due": due, "ended": 0, "replica": "", "text": "", "error": ""}
                self.records.append(record)
                group.create_task(self._one(self._stubs[number % CHANNELS], run, record))

    async def _one(self, stub: Any, run: dict[str, Any], record: dict[str, Any]) -> None:
        request = RunRequest(
            session_id=run["session"],
            input=[InputMessage(role="user", content=run["prompt"])],
            options=RunOptions(memory=False),
        )
        metadata = (("authorization", self._key), (SESSION_KEY, run["session"]))
        call = stub.Run(request, metadata=metadata, timeout=self._silence)
        last = ""
        try:
            async for response in call:
                for event in response.frame.events:
                    last = event.type
                    if last == "run.started":
                        record["replica"] = orjson.loads(event.data)["replica"]
                    elif last == "text.delta":
                        record["text"] += orjson.loads(event.data)["text"]
                    elif last in TERMINAL:
                        record["ended"] = time.monotonic_ns()
        except grpc.aio.AioRpcError as error:
            record["error"] = f"{error.code().name}: {error.details()}"
        else:
            if last != "run.completed":
                record["error"] = f"the stream ended after {last!r}"
        finally:
            call.cancel()

    async def close(self) -> None:
        """Closes the connections."""
        for channel in self._channels:
            await channel.close()


async def run(job: dict[str, Any]) -> None:
    """Plays one job."""
    generator = Generator(job)
    await generator.connect()
    gc.collect()
    gc.disable()
    say("ready")
    await asyncio.to_thread(sys.stdin.readline)
    cpu, began = time.process_time(), time.monotonic_ns()
    await generator.play(began)
    facts = {"began": began, "ended": time.monotonic_ns(), "cpu": time.process_time() - cpu}
    say(orjson.dumps(facts).decode())
    await generator.close()
    Path(job["out"]).with_suffix(".json").write_bytes(orjson.dumps(generator.records))


def main() -> None:
    """Reads the job and plays it."""
    uvloop.run(run(orjson.loads(Path(sys.argv[1]).read_bytes())))


if __name__ == "__main__":
    main()
