"""The world outside: counts every side effect that a tool had. A process of its own that nothing kills.

    python -m tests.chaos.traffic.ledger PORT HISTORY_FILE

One JSON line a request, one a reply. `{"act": {...}}` happens, is written down, and only then answered.
`{"ask": CALL}` says how often a call acted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.model.history import Recorder


class Ledger:
    """Acts by call, written down as they happen."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._acts: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one connection until it is closed."""
        try:
            while line := await reader.readline():
                writer.write(json.dumps(self.answer(json.loads(line))).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, json.JSONDecodeError):
            # A tool that was killed in the middle of a line.
            pass
        finally:
            writer.close()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a request asks."""
        if "act" in request:
            act = request["act"]
            self._acts[act["call"]] += 1
            self._recorder.write("act", **act)
            return {"acts": self._acts[act["call"]]}
        return {"acts": self._acts[request["ask"]]}


async def _main(port: int, path: Path) -> None:
    with Recorder(path) as recorder:
        server = await asyncio.start_server(Ledger(recorder).serve, "127.0.0.1", port)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), Path(sys.argv[2])))
