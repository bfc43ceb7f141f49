"""The servers' options against a real Envoy, whose HTTP/2 pings gRPC's defaults answer by hanging up."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from meshkit.channel import open_channel, stream_call
from meshkit.server import server_options
from meshkit.settings import MeshSettings
from tests.conftest import wait_for

CONFIG = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {listen}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: test
          codec_type: HTTP2
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: /}}, route: {{cluster: server, timeout: 0s}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: server
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options: {{connection_keepalive: {{interval: 0.1s, timeout: 1s}}}}
    load_assignment:
      cluster_name: server
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {server}}}}}}}
"""  # noqa: E501 -- the URL of a type has no shorter form


async def quiet(request: bytes, context: Any) -> AsyncIterator[bytes]:
    """Says something, is quiet while Envoy pings about twenty times, and says something again."""
    yield b"first"
    await asyncio.sleep(2)
    yield b"second"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def envoy(tmp_path: Path) -> Any:
    spec = importlib.util.find_spec("envoy")
    assert spec is not None
    assert spec.origin is not None
    binary = Path(spec.origin).parent / "_bin" / "envoy"
    running: list[subprocess.Popen[bytes]] = []

    def start(server: int) -> int:
        listen = free_port()
        config = tmp_path / "envoy.yaml"
        config.write_text(CONFIG.format(listen=listen, server=server))
        process = subprocess.Popen(
            [binary, "-c", config, "--use-dynamic-base-id", "--concurrency", "1", "-l", "error"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        running.append(process)
        wait_for(lambda: listens(listen), process)
        return listen

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=30)


async def test_a_quiet_stream_survives_envoys_pings(envoy: Any) -> None:
    server = grpc.aio.server(options=server_options())
    handler = grpc.unary_stream_rpc_method_handler(quiet)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", {"Quiet": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        settings = MeshSettings(mesh_address=f"127.0.0.1:{envoy(port)}")
        async with asyncio.timeout(20), open_channel(settings) as channel:
            async with stream_call(channel.unary_stream("/t.S/Quiet")(b"")) as call:
                assert [message async for message in call] == [b"first", b"second"]
    finally:
        await server.stop(0)
