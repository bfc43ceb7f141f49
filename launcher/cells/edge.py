"""The cells' edge: an Envoy whose configuration and tables are files in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from launcher import replies
from launcher.cells import answers
from launcher.cells.table import TABLE, Cell, Cells
from launcher.envoy import BUFFER_BYTES, MAX_CONNECTIONS, MAX_HEAP_MIB
from launcher.errors import explain_os_error

TEMPLATES = Path(__file__).resolve().parents[2] / "deploy" / "cells"
CONFIG = "edge.yaml"
CLUSTERS = "clusters.yaml"
HTTP_ROUTES = "http.yaml"
GRPC_ROUTES = "grpc.yaml"
ADMIN_SOCKET = "admin.sock"
_MATCHER = "type.googleapis.com/envoy.extensions.router.cluster_specifiers.matcher.v3"
_HEADER_INPUT = "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"
_ROUTES = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
# Of our own meaning inside a mesh: no client says them.
_INTERNAL = ["x-hermesh-mesh", "x-hermesh-tenant"]
_GRPC = """\
  typed_extension_protocol_options:
    envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
      "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
      explicit_http_config:
        http2_protocol_options:
          connection_keepalive: {interval: 10s, timeout: 5s}
          initial_stream_window_size: 262144
          initial_connection_window_size: 67108864
"""


def render(cells: Cells, folder: Path) -> str:
    """Returns the configuration for a folder of tables; it changes only with the edge's own addresses."""
    http_host, http_port = _split(cells.http)
    grpc_host, grpc_port = _split(cells.grpc)
    return Template((TEMPLATES / "edge.yaml.tmpl").read_text()).substitute(
        admin_socket=_quoted(folder / ADMIN_SOCKET),
        folder=_quoted(folder),
        clusters=_quoted(folder / CLUSTERS),
        http_routes=_quoted(folder / HTTP_ROUTES),
        grpc_routes=_quoted(folder / GRPC_ROUTES),
        http_host=http_host,
        http_port=http_port,
        grpc_host=grpc_host,
        grpc_port=grpc_port,
        lua=json.dumps((TEMPLATES / "tag.lua").read_text()),
        http_replies=answers.http_config(),
        grpc_replies=answers.grpc_config(),
        max_heap_bytes=MAX_HEAP_MIB * 1024 * 1024,
        max_connections=MAX_CONNECTIONS,
        max_headers=replies.MAX_HEADERS,
        max_headers_kb=replies.MAX_HEADERS_KB,
        headers_seconds=replies.HEADERS_SECONDS,
        request_seconds=replies.REQUEST_SECONDS,
        grpc_request_seconds=replies.GRPC_REQUEST_SECONDS,
        silent_seconds=replies.SILENT_SECONDS,
        buffer_bytes=BUFFER_BYTES,
    )


def render_clusters(cells: Cells) -> str:
    """Returns the cells as Envoy's clusters, two of each: HTTP and gRPC."""
    found = ["resources:"]
    for cell in cells.cells.values():
        found.append(_cluster(cell, "http"))
        found.append(_cluster(cell, "grpc"))
    return "\n".join(found)


def _cluster(cell: Cell, protocol: str) -> str:
    addresses = cell.http if protocol == "http" else cell.grpc
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}}
        for host, port in map(_split, addresses)
    ]
    return Template((TEMPLATES / "cluster.yaml.tmpl").read_text()).substitute(
        name=_name(cell.name, protocol),
        max_requests=cell.max_requests,
        health_check="http_health_check: {path: /health}" if protocol == "http" else "grpc_health_check: {}",
        protocol="" if protocol == "http" else _GRPC,
        endpoints=json.dumps(endpoints),
    )


def render_routes(cells: Cells, table: Mapping[str, str], protocol: str) -> str:
    """Returns the routes of a listener: tags are looked up at once, however many there are.

    Args:
        cells: The cells.
        table: Tag to cell; whoever is not in it is in the default cell.
        protocol: http or grpc.
    """

    def action(cell: str) -> dict[str, Any]:
        typed = {"@type": f"{_MATCHER}.ClusterAction", "cluster": _name(cell, protocol)}
        return {"action": {"name": cell, "typed_config": typed}}

    # Envoy takes no empty map.
    placed = {answers.NO_TAG: cells.default, **table}
    tree = {
        "input": {
            "name": "tag",
            "typed_config": {"@type": _HEADER_INPUT, "header_name": answers.TAG_HEADER},
        },
        "exact_match_map": {"map": {tag: action(cell) for tag, cell in sorted(placed.items())}},
    }
    plugin = {
        "name": "cells",
        "typed_config": {
            "@type": f"{_MATCHER}.MatcherClusterSpecifier",
            "cluster_matcher": {"matcher_tree": tree, "on_no_match": action(cells.default)},
        },
    }
    # What no cell has seen is tried again; the rest is the cell's Envoy's and the client's to repeat.
    route: dict[str, Any] = {
        "cluster_specifier_plugin": "cells",
        "timeout": "0s",
        "retry_policy": {"retry_on": "connect-failure,refused-stream,reset-before-request", "num_retries": 2},
    }
    routes = [{"match": {"prefix": "/"}, "route": route}]
    if protocol == "http":
        slow = route | {"idle_timeout": f"{replies.WHOLE_ANSWER_SECONDS}s"}
        routes.insert(0, {"match": {"path": "/v1/chat/completions"}, "route": slow})
    configuration = {
        "@type": _ROUTES,
        "name": protocol,
        "request_headers_to_remove": _INTERNAL,
        "cluster_specifier_plugins": [{"extension": plugin}],
        "virtual_hosts": [{"name": "cells", "domains": ["*"], "routes": routes}],
    }
    return json.dumps({"resources": [configuration]})


def write(cells: Cells, table: Mapping[str, str]) -> None:
    """Writes all that the edge's Envoys read; what has changed counts at once, by rename.

    Raises:
        LaunchError: A folder cannot be written to; those before it have the new table.
    """
    for folder in cells.folders:
        texts = {
            CONFIG: render(cells, folder),
            CLUSTERS: render_clusters(cells),
            HTTP_ROUTES: render_routes(cells, table, "http"),
            GRPC_ROUTES: render_routes(cells, table, "grpc"),
            TABLE: json.dumps(dict(sorted(table.items())), indent=1) + "\n",
        }
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, text in texts.items():
                _replace(folder / name, text)
        except OSError as error:
            raise explain_os_error(error, f"write the edge's tables in {folder}") from error


def _replace(path: Path, text: str) -> None:
    if path.exists() and path.read_text() == text:
        return
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text)
    partial.replace(path)


def _name(cell: str, protocol: str) -> str:
    return f"{cell}-{protocol}"


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _quoted(path: Path) -> str:
    # A JSON string is a YAML string, whatever is in it.
    return json.dumps(str(path), ensure_ascii=False)
