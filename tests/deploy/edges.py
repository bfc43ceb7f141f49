"""Clients of nginx and HAProxy before a mesh; `bench.edges` runs those."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import grpc
import grpc.aio
import httpx

from bench.edges import Behind, Edge, Program
from bench.edges import serving as serving_edge
from bench.mesh import Mesh
from tests.deploy.debian import debian

PROGRAMS: tuple[Program, ...] = ("nginx", "haproxy")
BEHIND: tuple[Behind, ...] = ("envoy", "gateways")
_PACKAGES = {"nginx": "nginx-light", "haproxy": "haproxy"}


@contextmanager
def serving(
    program: Program, behind: Behind, mesh: Mesh, changes: Mapping[str, str] | None = None
) -> Iterator[Edge]:
    """Debian's program before a mesh; see `bench.edges.serving`."""
    with serving_edge(program, behind, mesh, changes, debian(_PACKAGES[program], program)) as edge:
        yield edge


@asynccontextmanager
async def connect(edge: Edge, address: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    """A client with the mesh's key, which connects from an address of loopback."""
    transport = httpx.AsyncHTTPTransport(verify=edge.tls, local_address=address)
    timeout = httpx.Timeout(30, read=60)
    async with httpx.AsyncClient(
        transport=transport, base_url=edge.url, headers=edge.mesh.headers, timeout=timeout
    ) as found:
        yield found


@asynccontextmanager
async def connect_grpc(edge: Edge) -> AsyncIterator[grpc.aio.Channel]:
    """A channel as a client of gRPC opens one."""
    credentials = grpc.ssl_channel_credentials(edge.authority.read_bytes())
    async with grpc.aio.secure_channel(edge.host, credentials) as found:
        yield found


def servers(edge: Edge) -> list[str]:
    """Who answered, in the order of the requests, as the balancer's log names them."""
    lines = [json.loads(line) for line in edge.log().splitlines() if line.startswith("{")]
    # nginx names those that it tried, too.
    return [line.get("upstream", line.get("server", "")).rpartition(", ")[2] for line in lines]
