"""The suite's own eyes in PostgreSQL and Redis, past every proxy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import redis.asyncio
import redis.exceptions

from meshkit.postgres import load_sql
from services.session.store.redis_live import fence_key, stream_key
from tests.chaos.model.history import Recorder, digest

_SQL = load_sql(Path(__file__).parent, "audit.sql")
_RECORDED = ("grants", "calls", "log", "run_row", "message", "lease_row", "call_row")
_KINDS = {"grants": "grant", "calls": "call"}
_TEXTS = {"log": "data", "message": "content"}
_TIMEOUT = 10.0
# Longer than any fault keeps PostgreSQL down.
_PATIENCE = 30.0


class Audit:
    """Reads, and sets the clock of, a database whose schema has the suite's additions."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        """Connects; a PostgreSQL that is down, because another fault has stopped it, is waited for."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return await asyncpg.connect(self._url, timeout=_TIMEOUT, command_timeout=_TIMEOUT)
            except (OSError, TimeoutError, asyncpg.PostgresError):
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.1)

    async def _run(self, name: str, *args: Any) -> list[asyncpg.Record]:
        """Runs a statement until it was run: all of them may be repeated."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            connection = await self._connect()
            try:
                if args:
                    return list(await connection.fetch(_SQL[name], *args))
                await connection.execute(_SQL[name])
                return []
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                if time.monotonic() > deadline:
                    raise
            finally:
                connection.terminate()
            await asyncio.sleep(0.1)

    async def _fetch(self, name: str) -> list[asyncpg.Record]:
        connection = await self._connect()
        try:
            return list(await connection.fetch(_SQL[name]))
        finally:
            await connection.close()

    async def prepare_clock(self) -> None:
        """Before the services' schema is made."""
        await self._run("clock")

    async def install(self) -> None:
        """Once the services' schema is there."""
        await self._run("triggers")

    async def forget(self) -> None:
        """Begins a new record."""
        await self._run("forget")

    async def set_clock(self, seconds: float) -> None:
        """Moves PostgreSQL's clock, as its functions see it, away from the true time."""
        await self._run("set_clock", timedelta(seconds=seconds))

    async def unfinished(self, sessions: Sequence[str]) -> list[str]:
        """Runs that are neither over nor waiting for a person."""
        return [str(row["run_id"]) for row in await self._run("unfinished", list(sessions))]

    async def working(self) -> list[str]:
        """Runs of anybody's that are neither over nor waiting for a person."""
        return [str(row["run_id"]) for row in await self._fetch("working")]

    async def record_left(self, recorder: Recorder, deleted: Mapping[str, str]) -> None:
        """Writes down what PostgreSQL still holds of sessions that were deleted, given with their runs."""
        for row in await self._run("left", list(deleted), list(deleted.values())):
            recorder.write("left", **dict(row))
        for row in await self._run("late_calls", list(deleted)):
            recorder.write("begun", **dict(row))

    async def record(self, recorder: Recorder, sessions: Sequence[str]) -> None:
        """Writes down what PostgreSQL holds of some sessions, and what its triggers saw."""
        connection = await self._connect()
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                runs: list[str] = []
                for name in _RECORDED:
                    for row in await connection.fetch(_SQL[name], list(sessions)):
                        fields = dict(row)
                        text = _TEXTS.get(name)
                        if text:
                            fields["digest"] = digest(fields.pop(text))
                        if name == "log":
                            fields = {key: value for key, value in fields.items() if value is not None}
                        recorder.write(_KINDS.get(name, name), **fields)
                        if name == "run_row":
                            runs.append(fields["run"])
                for row in await connection.fetch(_SQL["key_row"], runs):
                    recorder.write("key_row", **dict(row))
        finally:
            await connection.close()


class LiveEyes:
    """Looks at the live streams of some runs again and again, and writes down what is new."""

    def __init__(self, url: str, recorder: Recorder) -> None:
        self._client = redis.asyncio.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2)
        self._recorder = recorder
        self._seen: dict[str, dict[str, str]] = {}
        self._fences: dict[str, int] = {}

    async def look(self, runs: Sequence[tuple[str, str]]) -> None:
        """Reads the streams of (session, run) pairs; while Valkey is down there is nothing to see."""
        try:
            for session, run in runs:
                await self._look(session, run)
        except (redis.exceptions.RedisError, OSError):
            return

    async def _look(self, session: str, run: str) -> None:
        seen = self._seen.setdefault(run, {})
        for entry, fields in await self._client.xrange(stream_key(session, run)):  # type: ignore[arg-type]
            kind, _, *data = fields[b"e"].decode().split(" ", 2)
            # The data of a large event is in PostgreSQL alone.
            mark = digest(data[0]) if data else ""
            place = entry.decode()
            # The same place with other bytes is a finding of its own.
            if seen.get(place) != mark:
                seen[place] = mark
                seq = int(place.partition("-")[0])
                self._recorder.write("live", session=session, run=run, seq=seq, type=kind, digest=mark)
        fence = await self._client.get(fence_key(session))  # type: ignore[arg-type]
        if fence is not None and self._fences.get(session) != int(fence):
            self._fences[session] = int(fence)
            self._recorder.write("live_fence", session=session, fence=int(fence))

    async def close(self) -> None:
        """Lets go of the connection."""
        await self._client.aclose()
