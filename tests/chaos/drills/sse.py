"""One HTTP request and its event stream, read so that a broken answer cannot pass for one that ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httptools
import orjson

CONNECT_SECONDS = 5.0
# Twice the gateway's heartbeat and more: a stream that says nothing for so long is dead.
READ_SECONDS = 45.0


class Broken(Exception):
    """No answer, another one than 200, or one that was cut off; the message says which."""

    def __init__(self, what: str, status: int = 0) -> None:
        super().__init__(what)
        self.status = status


class Over(Exception):
    """204: the log's last event was delivered before."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame.

    Attributes:
        kind: the event's type, `reconnect` among them.
        run_id: empty for what belongs to the transport.
        seq: 0 for what belongs to the transport.
        data: the event's `data`.
        at: when it was here, by the monotonic clock in seconds.
        time: when it was written, by its writer's clock, in seconds of the epoch; 0 for the transport's.
    """

    kind: str
    run_id: str
    seq: int
    data: dict[str, object]
    at: float
    time: float


class _Body:
    """Collects one response for httptools."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


async def stream(
    address: str, method: str, path: str, headers: dict[str, str], body: dict[str, object] | None = None
) -> AsyncIterator[Frame]:
    """Sends a request on a connection of its own and yields the frames of the answer.

    Raises:
        Broken: see there. An answer that ends as HTTP says it ends is not broken, whatever was in it.
        Over: there is nothing more.
    """
    host, _, port = address.rpartition(":")
    payload = orjson.dumps(body) if body is not None else b""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    except (OSError, TimeoutError) as error:
        raise Broken(f"no connection: {type(error).__name__}") from error
    try:
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(payload)}\r\n{lines}\r\n".encode()
            + payload
        )
        collected = _Body()
        parser = httptools.HttpResponseParser(collected)
        rest = b""
        while not collected.complete:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    data = await reader.read(1 << 16)
            except OSError as error:
                raise Broken(f"cut off: {type(error).__name__}") from error
            except TimeoutError as error:
                raise Broken("silent") from error
            if not data:
                raise Broken("cut off: the connection ended before the answer")
            at = time.monotonic()
            parser.feed_data(data)
            status = parser.get_status_code()
            if status not in (0, 200, 204):
                if collected.complete:
                    text = b"".join(collected.parts).decode(errors="replace")
                    raise Broken(f"{status} {text[:200]}", status)
                continue
            if not collected.parts:
                continue
            rest += b"".join(collected.parts)
            collected.parts.clear()
            *whole, rest = rest.split(b"\n\n")
            for text in whole:
                if frame := _frame(text, at):
                    yield frame
        if parser.get_status_code() == 204:
            raise Over
    finally:
        writer.close()


def _frame(text: bytes, at: float) -> Frame | None:
    fields = dict(line.split(b": ", 1) for line in text.split(b"\n") if line and not line.startswith(b":"))
    if not fields:
        return None
    run_id, _, seq = fields.get(b"id", b"").decode().rpartition(":")
    data = orjson.loads(fields.get(b"data", b"{}"))
    return Frame(
        fields.get(b"event", b"message").decode(),
        run_id,
        int(seq or 0),
        data.get("data", data),
        at,
        data.get("time", 0) / 1000,
    )
