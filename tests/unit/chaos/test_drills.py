"""The drills' clients against a server that breaks its answers: what a drill cannot see proves nothing."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos.drills.load import Load, Run, Script
from tests.chaos.drills.report import Report

RUN = "01890000-0000-7000-8000-000000000001"
RECONNECT = b'event: reconnect\ndata: {"reason":"drain","after_ms":0}\n\n'


def event(seq: int, kind: str, **data: Any) -> bytes:
    body = {"run_id": RUN, "seq": seq, "type": kind, "time": 1000, "data": data}
    return f"id: {RUN}:{seq}\nevent: {kind}\ndata: {json.dumps(body)}\n\n".encode()


CREATED, STARTED = event(1, "run.created"), event(2, "run.started", replica="agent-1")
HELLO, WORLD = event(3, "text.delta", text="hello "), event(4, "text.delta", text="world")
ENDED = event(5, "run.completed")


def answer(body: bytes, *, status: str = "200 OK", missing: int = 0) -> bytes:
    """A whole answer, or one whose last `missing` bytes never come."""
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body) + missing}\r\n\r\n".encode() + body


@asynccontextmanager
async def serving(answers: list[bytes]) -> AsyncIterator[tuple[Load, list[str]]]:
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        cursor = [line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("Last-Event-ID")]
        asked.append(f"{head.split(' ')[0]} {cursor[0] if cursor else ''}".strip())
        writer.write(answers.pop(0))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    mesh: Any = SimpleNamespace(headers={"Authorization": "Bearer x"})
    async with server:
        yield Load(mesh, lambda: [f"{host}:{port}"]), asked


async def follow(answers: list[bytes]) -> tuple[Load, Run, list[str]]:
    async with serving(answers) as (load, asked):
        run = Run(Script(2, 10))
        load.runs.append(run)
        async with asyncio.timeout(20):
            await load.follow("s", run)
        return load, run, asked


async def test_a_whole_run_is_no_error() -> None:
    load, run, asked = await follow([answer(CREATED + STARTED + HELLO + WORLD + ENDED)])
    assert (load.errors, load.refused, load.wrong, load.reconnects) == ([], [], [], 0)
    assert (run.ended, run.reply, asked) == ("run.completed", "hello world", ["POST"])


async def test_who_is_asked_to_comes_back_by_cursor_and_it_is_no_error() -> None:
    load, _, asked = await follow([answer(CREATED + STARTED + RECONNECT), answer(HELLO + WORLD + ENDED)])
    assert (load.errors, load.wrong, load.reconnects) == ([], [], 1)
    assert asked == ["POST", f"GET {RUN}:2"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (answer(CREATED + STARTED, missing=10), "cut off"),
        (answer(CREATED + STARTED), "without a terminal event or a reconnect"),
    ],
)
async def test_a_stream_that_breaks_is_an_error(broken: bytes, said: str) -> None:
    load, run, _ = await follow([broken, answer(HELLO + WORLD + ENDED)])
    [(_, what)] = load.errors
    assert said in what
    assert run.ended == "run.completed"


async def test_a_status_that_is_no_success_is_an_error() -> None:
    load, _, _ = await follow(
        [
            answer(b"no healthy upstream", status="503 Service Unavailable"),
            answer(CREATED + STARTED + RECONNECT),
            answer(b"{}", status="502 Bad Gateway"),
            answer(HELLO + WORLD + ENDED),
        ]
    )
    assert [what[:3] for _, what in load.refused] == ["503"]
    assert [what[:3] for _, what in load.errors] == ["502"]


async def test_nobody_there_is_an_error() -> None:
    async with serving([]) as (load, _):
        load.addresses = lambda: ["127.0.0.1:1"]
        task = asyncio.create_task(load.follow("s", Run(Script(2, 10))))
        async with asyncio.timeout(20):
            while not load.refused:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
    assert load.refused[0][1].startswith("no connection")


async def test_a_reconnect_without_a_cursor_is_an_error() -> None:
    load, _, asked = await follow([answer(RECONNECT), answer(CREATED + STARTED + HELLO + WORLD + ENDED)])
    assert "no cursor" in load.refused[0][1]
    assert asked == ["POST", "POST"]


@pytest.mark.parametrize(
    "events",
    [
        CREATED + STARTED + WORLD + ENDED,
        CREATED + STARTED + STARTED + HELLO + WORLD + ENDED,
        CREATED + STARTED + HELLO + event(4, "run.completed"),
    ],
)
async def test_gaps_duplicates_and_missing_words_are_seen(events: bytes) -> None:
    load, _, _ = await follow([answer(events)])
    assert load.wrong


async def test_a_reset_discards_and_a_second_attempt_counts() -> None:
    again = [
        event(4, "run.started", replica="agent-2"),
        event(5, "attempt.reset", from_seq=3),
        event(6, "text.delta", text="hello world"),
        event(7, "run.completed"),
    ]
    load, run, _ = await follow([answer(CREATED + STARTED + HELLO + b"".join(again))])
    assert load.wrong == []
    assert (run.reply, load.takeovers) == ("hello world", 1)


async def test_a_log_that_is_over_before_its_end_came_is_seen() -> None:
    load, _, _ = await follow([answer(CREATED + RECONNECT), answer(b"", status="204 No Content")])
    assert load.wrong


def test_a_broken_bound_is_said_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("x")
    report.at_most("small", 1.0, 2.0, " s")
    report.at_least("many", 3, 3)
    assert report.show()
    report.at_most("too much", 3, 2)
    assert not report.show()
    assert "BROKEN: too much" in capsys.readouterr().out


async def test_a_load_in_which_nothing_ended_breaks_the_report() -> None:
    async with serving([]) as (load, _):
        report = Report("x")
        report.streams(load)
        assert report.broken == ["runs completed"]
