"""A real Envoy with the rendered configuration, and replicas behind it that say what reached them."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio

from launcher import envoy
from launcher.ports import free_port
from meshkit.server import server_options

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SECONDS = 20.0
CHUNK = b"x" * 65_536


@dataclass
class Running:
    """An Envoy and where to reach it."""

    eds: Path
    admin: envoy.Admin
    pid: int
    http: str
    grpc: str
    mesh: str

    async def endpoints(self, cluster: str, replicas: list[Replica]) -> None:
        """Tells Envoy who there is, and returns when it sees the same, all of them well."""
        addresses = [replica.address for replica in replicas]
        envoy.write_endpoints(self.eds, cluster, addresses)
        wanted = {f"{cluster}/{address}": True for address in addresses}
        await self.until(cluster, wanted)

    async def until(self, cluster: str, wanted: dict[str, bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while True:
                found = await self.admin.healthy()
                if {key: value for key, value in found.items() if key.startswith(f"{cluster}/")} == wanted:
                    return
                await asyncio.sleep(0.02)


@contextmanager
def serving_envoy(**render: Any) -> Iterator[Running]:
    """Runs one; `render` goes to `render_local`."""
    folder = Path(tempfile.mkdtemp(prefix="hm-le-"))
    eds = folder / "eds"
    eds.mkdir()
    for cluster in envoy.CLUSTERS:
        envoy.write_endpoints(eds, cluster, ())
    ports = {name: free_port() for name in ("http_port", "grpc_port", "mesh_port")}
    config = folder / "envoy.yaml"
    config.write_text(envoy.render_local(eds=eds, admin_socket=folder / "admin.sock", **ports, **render))
    admin = envoy.Admin(folder / "admin.sock")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(envoy.command(config), stdout=log, stderr=log)

    async def answers() -> None:
        async with asyncio.timeout(SECONDS):
            while not await admin.answers():
                assert process.poll() is None, (folder / "log").read_text()
                await asyncio.sleep(0.02)

    try:
        asyncio.run(answers())
        addresses = [f"127.0.0.1:{port}" for port in ports.values()]
        yield Running(eds, admin, process.pid, f"http://{addresses[0]}", addresses[1], addresses[2])
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
        shutil.rmtree(folder)


class Replica(grpc.GenericRpcHandler):
    """A server that answers every unary call with who it is and what came, and floods where asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent = 0
        self.calls = 0
        # Calls whose headers came, whether or not their message did.
        self.begun = 0
        self.reached = asyncio.Event()
        self.health = aio.HealthServicer()
        self.server = grpc.aio.server(options=server_options())
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def service(self, details: Any) -> Any:
        if not details.method.startswith("/grpc.health."):
            self.begun += 1
            self.reached.set()
        if details.method.endswith("/WatchRun"):
            return grpc.unary_stream_rpc_method_handler(self.flood)
        return grpc.unary_unary_rpc_method_handler(self.echo)

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.calls += 1
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        return json.dumps({"replica": self.name, "metadata": metadata}).encode()

    async def flood(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(4096):
            yield CHUNK
            self.sent += len(CHUNK)
