"""Envoy: its configuration from deploy/envoy/, its endpoint files, and what its admin interface says."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from string import Template
from urllib.parse import quote

from launcher import replies
from launcher.embedded import package_folder
from launcher.errors import LaunchError

TEMPLATES = Path(__file__).resolve().parent.parent / "deploy" / "envoy"
CLUSTERS = ("gateway", "agent", "session", "tool", "memory")
BINARY = package_folder("envoy") / "_bin" / "envoy"
COMPOSE_PORT = 50051
COMPOSE_GATEWAY_PORT = 8080
STATUS_PORT = 9902
# What one connection may leave unread or unsent in Envoy: as much as the largest input.
_MIB = 1024 * 1024
BUFFER_BYTES = _MIB
MAX_HEAP_MIB = 1024
MAX_CONNECTIONS = 10_000
_OWN_FILES = 512
_UNDER_WAY = r"^http\.(http|grpc)\.downstream_rq_active$"


class Policy(StrEnum):
    """How Envoy chooses the agent of a run; `docs/load-balancing.md` has what each of them costs."""

    LEAST_REQUEST = "least_request"
    LEAST_REQUEST_FULL_SCAN = "least_request_full_scan"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    RING_HASH = "ring_hash"
    RING_HASH_BOUNDED = "ring_hash_bounded"


DEFAULT_POLICY = Policy.LEAST_REQUEST_FULL_SCAN

# The cluster's older field for it cannot say so.
FULL_SCAN = """LOAD_BALANCING_POLICY_CONFIG
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.least_request
          typed_config: {"@type": type.googleapis.com/%s, selection_method: FULL_SCAN}"""
FULL_SCAN %= "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest"
RING = "\n    ring_hash_lb_config: {minimum_ring_size: 1024}"
# The cluster's lines for each policy.
_BALANCING = {
    Policy.LEAST_REQUEST: "LEAST_REQUEST",
    Policy.LEAST_REQUEST_FULL_SCAN: FULL_SCAN,
    Policy.ROUND_ROBIN: "ROUND_ROBIN",
    Policy.RANDOM: "RANDOM",
    Policy.RING_HASH: "RING_HASH" + RING,
    Policy.RING_HASH_BOUNDED: "RING_HASH" + RING,
}
# No host gets more than 1.25 times its share of the requests in flight: the next one on the ring does.
BOUND = "\n      consistent_hashing_lb_config: {hash_balance_factor: 125}"
_HASH = ", hash_policy: [{header: {header_name: x-hermesh-session}}]"

_GRPC = """\
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options:
            # A replica that hangs keeps its connections, and the streams of clients with them: they have to
            # break before its leases end, so that who reads on is there when another replica goes on.
            connection_keepalive: {interval: 5s, timeout: 4s}
            # What one slow reader may leave unread in Envoy, and what all those of one replica may.
            initial_stream_window_size: 262144
            initial_connection_window_size: 67108864
"""


def _cluster(name: str, endpoints: str, policy: Policy = DEFAULT_POLICY) -> str:
    http = name == "gateway"
    check = "http_health_check: {path: /health}" if http else "grpc_health_check: {}"
    return Template((TEMPLATES / "cluster.yaml.tmpl").read_text()).substitute(
        name=name,
        balancing=_BALANCING[policy],
        bound=BOUND if policy is Policy.RING_HASH_BOUNDED else "",
        health_check=check,
        protocol="" if http else _GRPC,
        endpoints=endpoints,
    )


def render_local(
    *,
    eds: Path,
    admin_socket: Path,
    http_port: int,
    grpc_port: int,
    mesh_port: int,
    metrics_port: int = 0,
    agent_policy: Policy = DEFAULT_POLICY,
    pool: tuple[str, str] = ("", ""),
    max_connections: int = MAX_CONNECTIONS,
    max_heap_mib: int = MAX_HEAP_MIB,
) -> str:
    """The configuration for one machine: endpoints are files in `eds`, followed by rename.

    `pool` is listener and cluster of the model backends, where Envoy stands before them; the last two bound
    what outsiders get of it. `metrics_port` 0 serves the metrics nowhere but on the admin socket.
    """
    admin = f"{{pipe: {{path: {_quoted(admin_socket)}, mode: 384}}}}"
    added = [pool]
    if metrics_port:
        added.append(_status("127.0.0.1", metrics_port, f"{{pipe: {{path: {_quoted(admin_socket)}}}}}"))

    def endpoints(name: str) -> str:
        return (
            "    type: EDS\n"
            "    eds_cluster_config:\n"
            f"      service_name: {name}\n"
            "      eds_config:\n"
            "        resource_api_version: V3\n"
            f"        path_config_source: {{path: {_quoted(eds / f'{name}.yaml')}, "
            f"watched_directory: {{path: {_quoted(eds)}}}}}"
        )

    return _render(
        node_id="mesh",
        max_connections=max_connections,
        max_heap_bytes=max_heap_mib * _MIB,
        admin_address=admin,
        http_host="127.0.0.1",
        http_port=http_port,
        grpc_host="127.0.0.1",
        grpc_port=grpc_port,
        mesh_host="127.0.0.1",
        mesh_port=mesh_port,
        agent_hash=_HASH if agent_policy in (Policy.RING_HASH, Policy.RING_HASH_BOUNDED) else "",
        listeners="".join(listener for listener, _ in added),
        clusters="\n".join(
            [
                *(
                    _cluster(name, endpoints(name), agent_policy if name == "agent" else DEFAULT_POLICY)
                    for name in CLUSTERS
                ),
                *(cluster for _, cluster in added),
            ]
        ),
    )


def connections(wanted: int, files: int) -> int:
    """Returns how many connections from outside fit into a limit on open files.

    Each may need another one to a gateway; past the limit Envoy could not even refuse.
    """
    if files == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, max(64, (files - _OWN_FILES) // 2))


def _quoted(path: Path) -> str:
    # A JSON string is a YAML string, whatever is in it.
    return json.dumps(str(path), ensure_ascii=False)


def _status(host: str, port: int, admin: str) -> tuple[str, str]:
    """Listener and cluster that serve metrics and readiness, and nothing else of the admin interface."""
    listener = Template((TEMPLATES / "status_listener.yaml").read_text()).substitute(host=host, port=port)
    return listener, Template((TEMPLATES / "status_cluster.yaml").read_text()).substitute(admin=admin)


def render_compose() -> str:
    """The configuration for compose: each service's name resolves to all its replicas."""
    return _render_by_name("%s")


def render_chart() -> str:
    """The configuration for the Helm chart, which fills in its names; a Service resolves to all its pods."""
    return _render_by_name(
        "'{{ include \"hermesh.fullname\" . }}-%s.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}'",
        max_heap_bytes="{{ mul .Values.envoy.maxHeapMiB 1048576 }}",
    )


def _render_by_name(host: str, *, max_heap_bytes: str = "") -> str:
    """Endpoints by DNS; `host` is the name of a service's replicas, with %s for the service.

    Of the admin interface, metrics and readiness are served to those around, and nothing else.
    """

    def endpoints(name: str) -> str:
        port = COMPOSE_GATEWAY_PORT if name == "gateway" else COMPOSE_PORT
        return (
            "    type: STRICT_DNS\n"
            "    dns_refresh_rate: 1s\n"
            "    respect_dns_ttl: false\n"
            "    load_assignment:\n"
            f"      cluster_name: {name}\n"
            "      endpoints:\n"
            "      - lb_endpoints:\n"
            "        - endpoint: {address: {socket_address: "
            f"{{address: {host % name}, port_value: {port}}}}}}}"
        )

    admin = "{socket_address: {address: 127.0.0.1, port_value: 9901}}"
    listener, cluster = _status("0.0.0.0", STATUS_PORT, admin)  # noqa: S104 - it serves nothing but these
    return _render(
        node_id="mesh",
        max_connections=MAX_CONNECTIONS,
        max_heap_bytes=max_heap_bytes or MAX_HEAP_MIB * _MIB,
        admin_address=admin,
        http_host="0.0.0.0",  # noqa: S104 - inside its container; compose decides what is published
        http_port=8080,
        grpc_host="0.0.0.0",  # noqa: S104
        grpc_port=50051,
        mesh_host="0.0.0.0",  # noqa: S104
        mesh_port=50052,
        agent_hash="",
        listeners=listener,
        clusters="\n".join([*(_cluster(name, endpoints(name)) for name in CLUSTERS), cluster]).rstrip("\n")
        + "\n",
    )


def _render(**values: object) -> str:
    return Template((TEMPLATES / "envoy.yaml.tmpl").read_text()).substitute(
        values,
        http_replies=replies.http_config(),
        grpc_replies=replies.grpc_config(),
        methods=replies.METHODS,
        max_headers=replies.MAX_HEADERS,
        max_headers_kb=replies.MAX_HEADERS_KB,
        headers_seconds=replies.HEADERS_SECONDS,
        request_seconds=replies.REQUEST_SECONDS,
        grpc_request_seconds=replies.GRPC_REQUEST_SECONDS,
        silent_seconds=replies.SILENT_SECONDS,
        whole_answer_seconds=replies.WHOLE_ANSWER_SECONDS,
        max_grpc_request=replies.MAX_GRPC_REQUEST,
        buffer_bytes=BUFFER_BYTES,
    )


def render_endpoints(cluster: str, addresses: Sequence[str]) -> str:
    """An endpoint file, as JSON, which is YAML too."""
    endpoints = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        endpoints.append(
            {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        )
    return json.dumps(
        {
            "resources": [
                {
                    "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
                    "cluster_name": cluster,
                    "endpoints": [{"lb_endpoints": endpoints}],
                }
            ]
        }
    )


def write_endpoints(eds: Path, cluster: str, addresses: Sequence[str]) -> None:
    """Replaces an endpoint file by rename, the only way Envoy notices."""
    target = eds / f"{cluster}.yaml"
    text = render_endpoints(cluster, addresses)
    if target.exists() and target.read_text() == text:
        return
    partial = eds / f"{cluster}.yaml.tmp"
    partial.write_text(text)
    partial.replace(target)


def command(config: Path) -> list[str]:
    """The command that serves, in the foreground."""
    return [
        *(str(BINARY), "-c", str(config), "--concurrency", "1", "--disable-hot-restart"),
        *("--log-level", "warning", "--drain-time-s", "1", "--parent-shutdown-time-s", "2"),
    ]


def validate(config: Path) -> None:
    """Has Envoy read a configuration without serving. Raises LaunchError with what it says."""
    done = subprocess.run(
        [str(BINARY), "--mode", "validate", "-c", str(config), "--disable-hot-restart", "-l", "error"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0:
        raise LaunchError(f"Envoy refuses {config}: {(done.stderr or done.stdout).strip()[-500:]}")


@dataclass(frozen=True, slots=True)
class Admin:
    """Envoy's admin interface on its unix socket."""

    socket: Path

    async def _get(self, path: str) -> str | None:
        return await self._ask("GET", path)

    async def _ask(self, method: str, path: str) -> str | None:
        import httpx

        # Neither certificates nor a proxy have anything to do with a unix socket, and reading them costs.
        transport = httpx.AsyncHTTPTransport(uds=os.fspath(self.socket), verify=False)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://envoy", timeout=2, trust_env=False
            ) as client:
                answer = await client.request(method, path)
        except (httpx.HTTPError, OSError):
            return None
        return answer.text if answer.status_code == 200 else None

    async def answers(self) -> bool:
        """Whether Envoy serves."""
        return await self._get("/ready") is not None

    async def version(self) -> str:
        """Which one it is, such as 1.40.0; empty when it does not say."""
        text = await self._get("/server_info")
        # Commit, number, state and build, with slashes between them.
        parts = str(json.loads(text or "{}").get("version", "")).split("/")
        return parts[1] if len(parts) > 1 else ""

    async def leave(self) -> None:
        """Has Envoy take no new connection, and tell open ones to close with their next answer."""
        # In this order: who is told to close must not find the same Envoy again.
        await self._ask("POST", "/drain_listeners")
        await self._ask("POST", "/healthcheck/fail")

    async def under_way(self) -> int:
        """How many requests and streams of outsiders it serves; 0 where it does not answer."""
        text = await self._get(f"/stats?filter={quote(_UNDER_WAY)}") or ""
        return sum(int(line.rpartition(":")[2]) for line in text.splitlines() if ":" in line)

    async def healthy(self) -> Mapping[str, bool]:
        """Every endpoint that Envoy knows, by `cluster/host:port`, and whether it would get calls."""
        text = await self._get("/clusters?format=json")
        found: dict[str, bool] = {}
        for cluster in json.loads(text or "{}").get("cluster_statuses", ()):
            for host in cluster.get("host_statuses", ()):
                place = host["address"].get("socket_address")
                if place is None:
                    continue  # its own admin socket
                status = host.get("health_status", {})
                well = status.get("eds_health_status", "HEALTHY") == "HEALTHY" and not any(
                    value for key, value in status.items() if key.startswith("failed_")
                )
                found[f"{cluster['name']}/{place['address']}:{place['port_value']}"] = well
        return found
