"""What one message of a gRPC stream costs its reader and its writer, with each of gRPC's client engines.

    python -m bench.grpc_cost [--streams 32] [--messages 400]

Two processes on loopback, streams paced as a model's replies are; CPU microseconds a message, the best of
three tries.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import uvloop
from rich.console import Console
from rich.table import Table

ENGINES = {"event engine (gRPC's default)": "", "older engine (ours)": "-event_engine_client"}
BODY = b"x" * 120
PAUSE = 0.005
TRIES = 3


async def _serve(messages: int) -> None:
    """Serves one method, prints its port, and at the end of stdin its CPU seconds."""

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(messages):
            yield BODY
            await asyncio.sleep(PAUSE)

    server = grpc.aio.server()
    handler: Any = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Cost", {"Read": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(time.process_time(), flush=True)
    await server.stop(0)


async def _read(port: int, streams: int, messages: int) -> float:
    """Reads all the streams at once; returns this process's CPU seconds for it."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: Any = channel.unary_stream("/bench.Cost/Read")

        async def one() -> None:
            count = 0
            async for _ in method(b""):
                count += 1
            if count != messages:
                raise SystemExit(f"incomplete: {count} messages came where {messages} were sent")

        await one()
        before = time.process_time()
        await asyncio.gather(*(one() for _ in range(streams)))
        return time.process_time() - before


def _measure(streams: int, messages: int) -> None:
    """Starts a server and reads from it; prints both costs, microseconds a message."""
    command = [sys.executable, "-m", "bench.grpc_cost", "--serve", "--messages", str(messages)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        reader = uvloop.run(_read(int(server.stdout.readline()), streams, messages))
        server.stdin.close()
        writer = float(server.stdout.readline())
    print(reader * 1e6 / streams / messages, writer * 1e6 / (streams + 1) / messages)


def main() -> None:
    """Measures each engine in processes of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--messages", type=int, default=400, help="of each stream")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(_serve(arguments.messages))
        return
    if arguments.measure:
        _measure(arguments.streams, arguments.messages)
        return
    table = Table(title="CPU microseconds a message")
    for column in ("client engine", "reader", "writer"):
        table.add_column(column, justify="left" if column == "client engine" else "right")
    sizes = ["--streams", str(arguments.streams), "--messages", str(arguments.messages)]
    for name, engine in ENGINES.items():
        environment = {**os.environ, "GRPC_EXPERIMENTS": engine}
        found = []
        for _ in range(TRIES):
            printed = subprocess.run(
                [sys.executable, "-m", "bench.grpc_cost", "--measure", *sizes],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            found.append([float(value) for value in printed.split()])
        reader, writer = (min(column) for column in zip(*found, strict=True))
        table.add_row(name, f"{reader:.1f}", f"{writer:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
