"""A large tool result on its way from the tool service to a client, piece by piece and never as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import structlog
from starlette.types import Receive, Scope, Send

from gateway.clients import call
from gateway.streams import ABORT_EXTENSION
from hermesh.session.v1 import resources_pb2
from hermesh.tool.v1 import tool_service_pb2 as tool_pb
from meshkit.channel import stream_call
from meshkit.errors import InternalError

_log = structlog.get_logger("gateway.download")

# However large it is and however slow its reader.
DOWNLOAD_SECONDS = 600.0
# What a tool returned may be anybody's text: it is never shown as a page of ours.
HEADERS = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-disposition", b"attachment"),
    (b"cache-control", b"private, no-store"),
]


class Download:
    """An ASGI application that answers with a result of the object store.

    An error before the first byte is raised, for a proper HTTP status; after it the connection is cut, which
    the content-length tells from an end.

    Args:
        tools: the tool service's stub.
        tool_call: as the journal has it.
        write_timeout: seconds that the client may take nothing.
    """

    def __init__(self, tools: Any, tool_call: resources_pb2.ToolCall, write_timeout: float) -> None:
        self._tools = tools
        self._call = tool_call
        self._write_timeout = write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves it."""
        request = tool_pb.ReadResultRequest(
            content_ref=self._call.content_ref, session_id=self._call.session_id
        )
        async with AsyncExitStack() as stack:
            stream = await stack.enter_async_context(
                stream_call(self._tools.ReadResult(request, timeout=DOWNLOAD_SECONDS))
            )
            first = await call(anext(aiter(stream), None))
            if first is None:
                raise InternalError(message="the tool service sent no result")
            await self._send(
                send,
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [*HEADERS, (b"content-length", str(first.size).encode())],
                },
            )
            try:
                await self._body(stream, send)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                _log.warning("a download was cut off", error=type(error).__name__)
                abort = scope.get("extensions", {}).get(ABORT_EXTENSION)
                if abort is None:
                    raise
                abort()

    async def _body(self, stream: AsyncIterator[Any], send: Send) -> None:
        async for message in stream:
            await self._send(send, {"type": "http.response.body", "body": message.data, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._write_timeout):
            await send(message)
