"""`python -m services.memory`: runs the memory service; `... migrate` brings its tables up to date."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable

from meshkit.server import run
from meshkit.settings import load
from services.memory.app import apply_migrations, serve
from services.memory.settings import MemorySettings


def main() -> None:
    """Runs what the command line asks for."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["migrate"]):
        sys.stderr.write("usage: python -m services.memory [migrate]\n")
        raise SystemExit(2)
    settings = load(MemorySettings)
    run(_migrate(settings) if arguments else lambda: serve(settings))


def _migrate(settings: MemorySettings) -> Callable[[], Awaitable[None]]:
    async def body() -> None:
        applied = await apply_migrations(settings)
        sys.stdout.write("".join(f"applied {name}\n" for name in applied) or "nothing to apply\n")

    return body


if __name__ == "__main__":
    main()
