"""What one SSE event costs the gateway: CPU of its process, nothing else in the way.

    python -m bench.gateway_cost [--streams 32] [--seconds 5]

A gateway process stands before a double of the mesh (in this process) that only streams ready-made events,
so that the gateway's own work is all that its CPU seconds hold. Paced streams are what a model's replies
look like; floods show the floor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import grpc
import grpc.aio
import uvloop

from bench.process_cpu import cpu_seconds
from bench.sse_client import post_stream
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.common.v1.event_pb2 import Event, Frame
from hermesh.session.v1 import session_internal_service_pb2 as internal_pb

START_SECONDS = 20.0
TEXT = '{"text":"a token "}'


@dataclass(frozen=True, slots=True)
class Load:
    """One shape of a stream: events a frame, pause between frames in seconds (0: none), frames."""

    name: str
    batch: int
    pause: float
    frames: int


class Double:
    """Not a mesh: knows every key and streams `load` to everybody.

    Attributes:
        load: What the next runs send.
    """

    load: Load

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator[tuple[Self, int]]:
        """Serves one on a port of loopback while the block runs; yields it and the port."""
        double = cls()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(tuple(double.handlers()))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield double, port
        finally:
            await server.stop(0)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Returns the few methods that the gateway asks for here."""
        authenticate = grpc.unary_unary_rpc_method_handler(
            self._authenticate,
            request_deserializer=internal_pb.AuthenticateRequest.FromString,
            response_serializer=internal_pb.AuthenticateResponse.SerializeToString,
        )
        run = grpc.unary_stream_rpc_method_handler(
            self._run,
            request_deserializer=agent_pb.RunRequest.FromString,
            response_serializer=agent_pb.RunResponse.SerializeToString,
        )
        return [
            grpc.method_handlers_generic_handler(
                "hermesh.session.v1.SessionInternalService", {"Authenticate": authenticate}
            ),
            grpc.method_handlers_generic_handler("hermesh.agent.v1.AgentService", {"Run": run}),
        ]

    async def _authenticate(self, request: Any, context: Any) -> Any:
        return internal_pb.AuthenticateResponse(tenant_id=str(uuid4()))

    async def _run(self, request: Any, context: Any) -> AsyncIterator[Any]:
        load, run_id, seq = self.load, str(uuid4()), 0
        for number in range(load.frames):
            events = []
            for _ in range(load.batch):
                seq += 1
                events.append(Event(run_id=run_id, seq=seq, type="text.delta", time_ms=1, data=TEXT))
            if number == load.frames - 1:
                events[-1].type = "run.completed"
            yield agent_pb.RunResponse(frame=Frame(events=events))
            if load.pause:
                await asyncio.sleep(load.pause)


async def client(url: str, count: int) -> None:
    """Reads one run and checks that all of it came."""
    body = {"input": "x", "stream": True}
    headers = {"authorization": "Bearer hm_bench"}
    seen = 0
    async for chunk in post_stream(f"{url}/v1/sessions/{uuid4()}/runs", body, headers):
        seen += chunk.body.count(b"\nid: ") + chunk.body.startswith(b"id: ")
    if seen != count:
        raise SystemExit(f"{seen} events came where {count} were sent")


async def measure(double: Double, load: Load, url: str, pid: int, streams: int) -> tuple[float, float]:
    """Returns CPU microseconds an event of the gateway, and events a second."""
    double.load = load
    count = load.batch * load.frames
    await client(url, count)
    before, began = cpu_seconds(pid), time.monotonic()
    await asyncio.gather(*(client(url, count) for _ in range(streams)))
    seconds = time.monotonic() - began
    events = streams * count
    return (cpu_seconds(pid) - before) / events * 1e6, events / seconds


async def run(streams: int, seconds: float) -> None:
    """Starts the double and a gateway, and prints a line a load."""
    async with Double.serving() as (double, port), gateway_process(f"127.0.0.1:{port}") as (pid, address):
        paced = max(1, round(seconds * 50))
        for load in (
            Load("50 events/s a stream, one a frame", 1, 0.02, paced),
            Load("50 events/s a stream, eight a frame", 8, 0.16, max(1, paced // 8)),
            Load("flood, one a frame", 1, 0, 2_000),
            Load("flood, eight a frame", 8, 0, 500),
        ):
            cost, rate = await measure(double, load, f"http://{address}", pid, streams)
            print(f"{load.name:38} {cost:7.1f} us CPU an event {rate:10,.0f} events/s")


@asynccontextmanager
async def ended(process: Process) -> AsyncIterator[None]:
    """Ends a process when the block is left."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


@asynccontextmanager
async def gateway_process(mesh_address: str) -> AsyncIterator[tuple[int, str]]:
    """Starts a gateway before a mesh; yields its pid and address."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "gateway.json"
        env = os.environ | {
            "HERMESH_MESH_ADDRESS": mesh_address,
            "HERMESH_READY_FILE": str(ready),
            "HERMESH_LISTEN": "127.0.0.1:0",
            "HERMESH_LOG_LEVEL": "warning",
            "HERMESH_DRAIN_DELAY_SECONDS": "0",
        }
        gateway = await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", env=env)
        async with ended(gateway):
            yield gateway.pid, await _address(ready)


async def _address(ready: Path) -> str:
    """Waits for a gateway's ready file and returns its address."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            found = _read(ready)
            if found:
                return found
            await asyncio.sleep(0.02)


def _read(ready: Path) -> str:
    return str(json.loads(ready.read_text())["address"]) if ready.exists() else ""


def parse(description: str | None) -> argparse.Namespace:
    """Parses the arguments: `streams` and `seconds`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=32, help="clients at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the paced loads")
    return parser.parse_args()


def main() -> None:
    """Parses the arguments and measures."""
    arguments = parse(__doc__)
    uvloop.run(run(arguments.streams, arguments.seconds))


if __name__ == "__main__":
    main()
