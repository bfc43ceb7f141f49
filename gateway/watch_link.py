"""One stream of `Watch` to a session replica, for any number of watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import grpc.aio
import structlog

from hermesh.session.v1 import session_internal_service_pb2 as pb
from meshkit.channel import stream_call

if TYPE_CHECKING:
    from gateway.watches import Line, Watches

_log = structlog.get_logger("gateway.watch_link")

# The replica says something each 5 s. A stopped process keeps its connections: nothing else would tell.
_SILENCE_S = 15.0
_STARTS = 500


class Link:
    """A stream, and the lines that it carries.

    Attributes:
        lines: By the ids that they have on this stream.
    """

    def __init__(self, stub: Any, watches: Watches) -> None:
        """Makes a link that is yet to run; what is started on it waits for that."""
        self.lines: dict[int, Line] = {}
        self._stub = stub
        self._watches = watches
        self._last_id = 0
        self._starts: dict[int, Line] = {}
        self._stops: list[int] = []
        self._acks: dict[int, int] = {}
        self._wake = asyncio.Event()
        self._finishing = False

    async def run(self) -> None:
        """Carries lines until the stream ends, then gives them back."""
        why = "ended"
        try:
            async with stream_call(self._stub.Watch(self._requests())) as call:
                while True:
                    async with asyncio.timeout(_SILENCE_S):
                        response = await call.read()
                    if response is grpc.aio.EOF:
                        return
                    for frame in response.frames:
                        self._watches.take(self, frame)
        except TimeoutError:
            why = "silent"
            _log.warning("a stream of watches was silent for too long", seconds=_SILENCE_S)
        except grpc.aio.AioRpcError as error:
            why = error.code().name
        finally:
            self._finishing = True
            self._wake.set()
            self._watches.lost(self, why)

    def start(self, line: Line) -> None:
        """Begins a line's watch from its place."""
        self._last_id += 1
        line.watch_id = self._last_id
        self.lines[line.watch_id] = self._starts[line.watch_id] = line
        self._wake.set()

    def stop(self, line: Line) -> None:
        """Ends a line's watch here."""
        if self.lines.pop(line.watch_id, None) is None:
            return
        self._acks.pop(line.watch_id, None)
        if self._starts.pop(line.watch_id, None) is None:
            self._stops.append(line.watch_id)
            self._wake.set()

    def ack(self, line: Line) -> None:
        """Says how much of a line was taken."""
        self._acks[line.watch_id] = line.taken
        self._wake.set()

    def finish(self) -> None:
        """Ends the stream: nobody needs it any more."""
        self._finishing = True
        self._wake.set()

    async def _requests(self) -> AsyncGenerator[pb.WatchRequest, None]:
        """Yields what gathered since the last message, as one."""
        while True:
            await self._wake.wait()
            if self._finishing and not self._stops:
                return
            request = pb.WatchRequest(stops=self._stops)
            self._stops = []
            while self._starts and len(request.starts) < _STARTS:
                request.starts.append(self._starts.pop(next(iter(self._starts))).start())
            for watch_id, taken in self._acks.items():
                request.acks.add(watch_id=watch_id, taken=taken)
            self._acks.clear()
            if not self._starts:
                self._wake.clear()
            if self._finishing:
                self._wake.set()
            yield request
