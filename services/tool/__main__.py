"""`python -m services.tool`: runs the tool service."""

from __future__ import annotations

from meshkit.server import run
from meshkit.settings import load
from services.tool.app import serve
from services.tool.settings import ToolSettings


def main() -> None:
    """Runs the service until it is told to stop."""
    settings = load(ToolSettings)
    run(lambda: serve(settings))


if __name__ == "__main__":
    main()
