"""What one event costs on its way to a browser: through our gateway, or straight from Envoy's transcoder.

    python -m bench.transcoder_cost [--streams 32] [--seconds 5]

An Envoy stands before a double of the agent (in this process) that only streams ready-made events. On one
listener it passes HTTP to a gateway, which calls the double through Envoy, as the mesh does; on the other its
gRPC-JSON transcoder calls the double itself. Both write one SSE frame an event. CPU of Envoy and the gateway.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import tempfile
from pathlib import Path
from uuid import uuid4

import grpc_tools
import uvloop
from grpc_tools import protoc
from rich.console import Console
from rich.table import Table

from bench.gateway_cost import START_SECONDS, Double, Load, client, ended, gateway_process, parse
from bench.mesh import free_ports, wait_until
from bench.process_cpu import cpu_seconds
from bench.sse_client import post_stream
from launcher.envoy import BINARY

ROOT = Path(__file__).resolve().parent.parent
MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
FILTERS = "type.googleapis.com/envoy.extensions.filters.http"


def _descriptors(path: Path) -> None:
    """Writes the descriptor set that the transcoder reads."""
    google = Path(grpc_tools.__file__).parent / "_proto"
    folders = [f"-I{folder}" for folder in (ROOT / "protos", ROOT / "third_party", google)]
    arguments = ["protoc", *folders, "--include_imports"]
    if protoc.main([*arguments, f"--descriptor_set_out={path}", "hermesh/agent/v1/agent_service.proto"]):
        raise SystemExit("protoc could not read the protos")


def _listener(port: int, cluster: str, filters: list[dict[str, object]]) -> dict[str, object]:
    router = {"name": "router", "typed_config": {"@type": f"{FILTERS}.router.v3.Router"}}
    manager = {
        "@type": f"type.googleapis.com/{MANAGER}",
        "stat_prefix": cluster,
        "codec_type": "AUTO",
        "http_filters": [*filters, router],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}],
                }
            ]
        },
    }
    return {
        "name": f"{cluster}-{port}",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def _cluster(name: str, port: int, *, http2: bool) -> dict[str, object]:
    endpoint = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}
    cluster: dict[str, object] = {
        "name": name,
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
    }
    if http2:
        options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        cluster["typed_extension_protocol_options"] = {
            options: {
                "@type": f"type.googleapis.com/{options}",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        }
    return cluster


def envoy_config(
    ports: dict[str, int], agent_port: int, gateway_port: int, descriptors: Path
) -> dict[str, object]:
    """Returns Envoy's configuration: the mesh's two hops on `http` and `mesh`, one hop on `transcoder`."""
    transcoder: dict[str, object] = {
        "name": "envoy.filters.http.grpc_json_transcoder",
        "typed_config": {
            "@type": f"{FILTERS}.grpc_json_transcoder.v3.GrpcJsonTranscoder",
            "proto_descriptor": str(descriptors),
            "services": ["hermesh.agent.v1.AgentService"],
            "auto_mapping": True,
            "print_options": {
                "stream_sse_style_delimited": True,
                "stream_newline_delimited": True,
                "preserve_proto_field_names": True,
            },
        },
    }
    return {
        "static_resources": {
            "listeners": [
                _listener(ports["http"], "gateway", []),
                _listener(ports["mesh"], "agent", []),
                _listener(ports["transcoder"], "agent", [transcoder]),
            ],
            "clusters": [
                _cluster("gateway", gateway_port, http2=False),
                _cluster("agent", agent_port, http2=True),
            ],
        }
    }


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


async def transcoded(url: str, count: int) -> None:
    """Reads one run from the transcoder and checks that all of it came."""
    seen = 0
    body = {"session_id": str(uuid4()), "input": [{"role": "user", "content": "x"}]}
    headers = {"authorization": "Bearer hm_bench"}
    async for chunk in post_stream(f"{url}/hermesh.agent.v1.AgentService/Run", body, headers):
        seen += chunk.body.count(b'"seq":')
    if seen != count:
        raise SystemExit(f"{seen} events came from the transcoder where {count} were sent")


async def run(streams: int, seconds: float) -> None:
    """Starts the parts, measures both ways under each load and prints a table."""
    ports = dict(zip(("http", "mesh", "transcoder"), free_ports(3), strict=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _descriptors(folder / "agent.pb")
        async with (
            Double.serving() as (double, agent_port),
            gateway_process(f"127.0.0.1:{ports['mesh']}") as (gateway, address),
        ):
            gateway_port = int(address.rpartition(":")[2])
            config = folder / "envoy.json"
            config.write_text(json.dumps(envoy_config(ports, agent_port, gateway_port, folder / "agent.pb")))
            envoy = await asyncio.create_subprocess_exec(
                str(BINARY), "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "-l", "error",
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            async with ended(envoy):
                await asyncio.to_thread(
                    wait_until, lambda: all(map(_listens, ports.values())), START_SECONDS, "Envoy"
                )
                await _compare(double, ports, gateway, envoy.pid, streams, seconds)


async def _compare(
    double: Double, ports: dict[str, int], gateway: int, envoy: int, streams: int, seconds: float
) -> None:
    table = Table(title=f"{streams} streams, CPU microseconds an event")
    for column in ("load", "gateway", "its Envoy hops", "together", "transcoder alone"):
        table.add_column(column, justify="left" if column == "load" else "right")
    paced = max(1, round(seconds * 50))
    for load in (
        Load("50 events/s a stream, one a frame", 1, 0.02, paced),
        Load("flood, one a frame", 1, 0, 2_000),
        Load("flood, eight a frame", 8, 0, 500),
    ):
        double.load = load
        count = load.batch * load.frames
        costs: list[float] = []
        for read, port in ((client, ports["http"]), (transcoded, ports["transcoder"])):
            url = f"http://127.0.0.1:{port}"
            await read(url, count)
            before = cpu_seconds(gateway), cpu_seconds(envoy)
            await asyncio.gather(*(read(url, count) for _ in range(streams)))
            after = cpu_seconds(gateway), cpu_seconds(envoy)
            costs += [(b - a) / streams / count * 1e6 for a, b in zip(before, after, strict=True)]
        ours, hops, _, alone = costs
        table.add_row(load.name, f"{ours:.1f}", f"{hops:.1f}", f"{ours + hops:.1f}", f"{alone:.1f}")
    Console().print(table)


def main() -> None:
    """Parses the arguments and measures."""
    arguments = parse(__doc__)
    uvloop.run(run(arguments.streams, arguments.seconds))


if __name__ == "__main__":
    main()
