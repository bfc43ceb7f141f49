"""A small streaming HTTP client that notes when bytes came, so that a bench measures the server."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

READ_SECONDS = 60.0


class BadAnswer(Exception):
    """The server answered with another status than 200; the message has its body."""


class _Body:
    """Collects one response for httptools."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


@dataclass(frozen=True, slots=True)
class Chunk:
    """Body bytes that came together, and when, by the monotonic clock in seconds."""

    body: bytes
    at: float


async def post_stream(
    url: str, body: dict[str, Any], headers: dict[str, str], tls: ssl.SSLContext | None = None
) -> AsyncIterator[Chunk]:
    """Posts JSON on a connection of its own and yields the body as it comes; `tls` for an https URL.

    Raises BadAnswer on a status that is not 200, TimeoutError when nothing comes for a minute.
    """
    parts = urlsplit(url)
    payload = orjson.dumps(body)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20, ssl=tls)
    try:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(payload)}\r\n{head}\r\n".encode()
            + payload
        )
        collected = _Body()
        parser = httptools.HttpResponseParser(collected)
        while not collected.complete:
            async with asyncio.timeout(READ_SECONDS):
                data = await reader.read(1 << 16)
            at = time.monotonic()
            if not data:
                return
            parser.feed_data(data)
            if collected.parts:
                text = b"".join(collected.parts)
                collected.parts.clear()
                if parser.get_status_code() != 200:
                    raise BadAnswer(text.decode(errors="replace"))
                yield Chunk(text, at)
    finally:
        writer.close()
