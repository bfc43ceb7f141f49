"""nginx and HAProxy before the agents, where they are installed: processes of the bench's own."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.mesh import MeshError, free_ports, wait_until

# Debian puts daemons where only root looks.
_PATHS = ":".join(("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin"))
START_SECONDS = 10.0

_NGINX = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  http2_max_concurrent_streams 4096;
  keepalive_requests 10000000;
  upstream agents {{
    {policy}
{servers}
    keepalive 512;
    keepalive_requests 10000000;
  }}
  server {{
    listen 127.0.0.1:{port} http2;
    location / {{
      grpc_pass grpc://agents;
      grpc_read_timeout 300s;
      grpc_send_timeout 300s;
    }}
  }}
}}
"""

_HAPROXY = """\
global
  maxconn 8192
  nbthread 1
  tune.h2.max-concurrent-streams 4096
defaults
  mode http
  timeout connect 1s
  timeout client 300s
  timeout server 300s
frontend grpc
  bind 127.0.0.1:{port} proto h2
  default_backend agents
backend agents
  balance {policy}
  http-reuse always
{servers}
"""


@dataclass(frozen=True, slots=True)
class Front:
    """A load balancer with a policy, as its own configuration names it."""

    program: Literal["nginx", "haproxy"]
    policy: str

    @property
    def name(self) -> str:
        """How tables name it."""
        return f"{'nginx' if self.program == 'nginx' else 'HAProxy'} {self.policy or 'round robin'}"

    @property
    def binary(self) -> str | None:
        """Where it is installed; None for nowhere."""
        found = binary_of(self.program)
        return str(found) if found else None

    def configuration(self, folder: Path, port: int, agents: Sequence[str]) -> str:
        """Returns what it reads to balance over these addresses."""
        if self.program == "nginx":
            servers = "\n".join(f"    server {agent};" for agent in agents)
            policy = f"{self.policy};" if self.policy else ""
            return _NGINX.format(folder=folder, port=port, policy=policy, servers=servers)
        servers = "\n".join(f"  server agent{n} {agent} proto h2" for n, agent in enumerate(agents))
        return _HAPROXY.format(port=port, policy=self.policy, servers=servers)

    @contextmanager
    def running(self, folder: Path, agents: Sequence[str]) -> Iterator[str]:
        """Runs it and yields its address. Raises MeshError when it does not come to listen."""
        assert self.binary is not None
        (port,) = free_ports(1)
        config = folder / f"{self.program}.conf"
        config.write_text(self.configuration(folder, port, agents))
        arguments = ["-c", str(config)] if self.program == "nginx" else ["-db", "-f", str(config)]
        if self.program == "nginx":
            arguments += ["-p", str(folder)]
        process = subprocess.Popen([self.binary, *arguments], stdin=subprocess.DEVNULL)
        try:
            wait_until(lambda: process.poll() is not None or listens(port), START_SECONDS, self.name)
            if process.poll() is not None:
                raise MeshError(f"{self.name} ended at once; its message is above")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=10)


FRONTS = (
    Front("nginx", ""),
    Front("nginx", "least_conn"),
    Front("haproxy", "roundrobin"),
    Front("haproxy", "leastconn"),
)


def binary_of(program: str) -> Path | None:
    """Where a program is installed; None for nowhere."""
    found = shutil.which(program) or shutil.which(program, path=_PATHS)
    return Path(found) if found else None


def listens(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
