"""Several model backends as one, behind Envoy: fewest requests, or by session with bounded load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Literal
from urllib.parse import urlsplit

from launcher.envoy import BOUND, FULL_SCAN, RING, TEMPLATES
from launcher.errors import LaunchError

Balance = Literal["agent", "least_request", "session"]

_POLICIES: dict[Balance, str] = {
    "least_request": f"lb_policy: {FULL_SCAN}",
    "session": f"lb_policy: RING_HASH{RING}\n    common_lb_config:{BOUND}",
}


@dataclass(frozen=True, slots=True)
class ModelPool:
    """What Envoy needs to know.

    Attributes:
        port: where agents find the pool, on loopback.
        places: host and port of each backend.
        path: under which all of them serve the API.
        balance: which one gets a request.
    """

    port: int
    places: Sequence[tuple[str, int]]
    path: str
    balance: Balance

    @classmethod
    def of(cls, urls: Sequence[str], balance: Balance, port: int) -> ModelPool | None:
        """Returns the pool over some backends; None where the agents themselves choose.

        Raises:
            LaunchError: Envoy cannot have these backends.
        """
        if balance == "agent" or not urls:
            return None
        parts = [urlsplit(url.rstrip("/")) for url in urls]
        if any(part.scheme != "http" or not part.hostname for part in parts):
            raise LaunchError(f"HERMESH_MODEL_BALANCE={balance} takes backends at http:// URLs only")
        paths = {part.path for part in parts}
        if len(paths) > 1:
            found = ", ".join(sorted(paths))
            raise LaunchError(f"HERMESH_MODEL_BALANCE={balance} takes backends with one path, not {found}")
        return cls(port, [(part.hostname or "", part.port or 80) for part in parts], paths.pop(), balance)

    @property
    def url(self) -> str:
        """The pool's own base URL."""
        return f"http://127.0.0.1:{self.port}{self.path}"

    def listener(self) -> str:
        """Returns the listener's configuration."""
        return _template("model_listener").substitute(port=self.port)

    def cluster(self) -> str:
        """Returns the cluster's configuration."""
        endpoints = "\n".join(
            f"        - endpoint: {{address: {{socket_address: {{address: {host}, port_value: {port}}}}}}}"
            for host, port in self.places
        )
        return _template("model_cluster").substitute(policy=_POLICIES[self.balance], endpoints=endpoints)


def _template(name: str) -> Template:
    return Template((TEMPLATES / f"{name}.yaml.tmpl").read_text())
