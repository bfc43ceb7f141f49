"""A double of a server whose sessions can be followed."""

import asyncio
import re


class EventServer:
    """Streams events: each POST to /NUMBER brings the watchers of GET /NUMBER one event after a heartbeat."""

    def __init__(self, *, answers=True):
        self.answers = answers
        self.streams = {}
        self.connections = []

    async def serve(self, reader, writer):
        self.connections.append(asyncio.current_task())
        try:
            await self.answer(reader, writer)
        finally:
            writer.close()
            await writer.wait_closed()

    async def answer(self, reader, writer):
        while line := await reader.readline():
            method, path, _ = line.decode().split()
            head = await reader.readuntil(b"\r\n\r\n")
            if method == "GET":
                self.streams.setdefault(path, []).append(writer)
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n: heartbeat\n\n\r\n")
                continue
            await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))
            writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}")
            if self.answers:
                for stream in self.streams[path]:
                    stream.write(b"d\r\n: heartbeat\n\n\r\n")
                    stream.write(b"b\r\nid: r:1\na\n\n\r\n")
