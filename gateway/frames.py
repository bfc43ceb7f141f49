"""What an event looks like on an HTTP stream: built by concatenation, its body never parsed."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from hermesh.common.v1.event_pb2 import Event

SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    # nginx buffers a response without this.
    (b"x-accel-buffering", b"no"),
)
HEARTBEAT = b": heartbeat\n\n"


def _one_line(data: str) -> str:
    # A line break can only stand between the tokens of JSON; in an SSE frame it would end the field.
    if "\n" in data or "\r" in data:
        data = data.replace("\r", " ").replace("\n", " ")
    return data


def event_json(event: Event) -> str:
    """Returns an event as the JSON object that every HTTP client sees."""
    return (
        f'{{"run_id":"{event.run_id}","seq":{event.seq},"type":"{event.type}","time":{event.time_ms},'
        f'"data":{_one_line(event.data) or "{}"}}}'
    )


def sse(events: Iterable[Event]) -> bytes:
    """Returns the SSE frames of some events, ready for one write."""
    parts: list[str] = []
    for event in events:
        run_id, seq, kind = event.run_id, event.seq, event.type
        parts.append(
            f"id: {run_id}:{seq}\nevent: {kind}\n"
            f'data: {{"run_id":"{run_id}","seq":{seq},"type":"{kind}","time":{event.time_ms},'
            f'"data":{_one_line(event.data) or "{}"}}}\n\n'
        )
    return "".join(parts).encode()


def reconnect_sse(reason: str, after_ms: int = 0) -> bytes:
    """Returns the transport's own last frame: no id, so that the client keeps its cursor."""
    body = orjson.dumps({"reason": reason, "after_ms": after_ms}).decode()
    # `retry` sets an EventSource's own pause before it comes back.
    return f"retry: {max(after_ms, 100)}\nevent: reconnect\ndata: {body}\n\n".encode()


def reconnect_json(reason: str, after_ms: int = 0) -> str:
    """Returns the same for a WebSocket."""
    return orjson.dumps({"type": "reconnect", "data": {"reason": reason, "after_ms": after_ms}}).decode()
