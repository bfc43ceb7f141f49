"""`python -m gateway`: one gateway process."""

from __future__ import annotations

from gateway.server import serve
from gateway.settings import GatewaySettings
from meshkit.lifecycle import run
from meshkit.settings import load


def main() -> None:
    """Reads the settings and serves until told to stop."""
    settings = load(GatewaySettings)
    run(lambda: serve(settings))


if __name__ == "__main__":
    main()
