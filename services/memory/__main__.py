"""Runs the memory service.

python -m services.memory            serves until it is told to stop
python -m services.memory migrate    brings the tables up to date (--pre: as far as former code bears)
python -m services.memory reembed    renews the vectors after a change of embedder
"""

from __future__ import annotations

import sys

from meshkit.server import run
from meshkit.settings import load
from services.memory.app import apply_migrations, apply_reembed, serve
from services.memory.settings import MemorySettings


def main() -> None:
    """Runs what the command line asks for."""
    command = " ".join(sys.argv[1:]) or "serve"
    if command not in ("serve", "migrate", "migrate --pre", "reembed"):
        sys.stderr.write("usage: python -m services.memory [migrate [--pre] | reembed]\n")
        raise SystemExit(2)
    settings = load(MemorySettings)

    async def body() -> None:
        if command.startswith("migrate"):
            applied = await apply_migrations(settings, before_rollout=command.endswith("--pre"))
            sys.stdout.write("".join(f"applied {name}\n" for name in applied) or "nothing to apply\n")
        elif command == "reembed":
            sys.stdout.write(f"{await apply_reembed(settings)} memories have new vectors\n")
        else:
            await serve(settings)

    run(body)


if __name__ == "__main__":
    main()
