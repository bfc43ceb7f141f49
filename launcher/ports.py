"""Ports of loopback: which are free, and which are taken."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

# Outgoing connections take their ports from the range above: a port of ours must not be one of theirs
# when the process behind it starts again.
LOWEST = 10240
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def port_problem(port: int) -> str:
    """Why nobody can listen on this port of loopback; empty if one can."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            return "is not open to this user" if error.errno == errno.EACCES else "is in use"
    return ""


def free_port() -> int:
    """Returns a port of loopback that nobody listens on, and that no outgoing connection will take."""
    try:
        highest = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        highest = 0
    if highest - LOWEST >= 1000:
        for _ in range(100):
            port = random.randrange(LOWEST, highest)  # noqa: S311 - not a secret
            if not port_problem(port):
                return port
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
