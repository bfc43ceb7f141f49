"""How much of a reply is in PostgreSQL and in Valkey at the moment when the client sees a token of it.

A paced reply is read until a token is there. Then, while the stream goes on, every row of every table is
read, binary columns decoded, and so is every value in Valkey; the tokens in them are counted. After the
reply's end all is read once more: what is found then shows that this way of looking finds what is there.
The stores must hold no reply from before.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import redis

from bench.target import Target

SEEN = 40
TOKENS = 80
RATE = 20
SECONDS = 60.0
_TOKEN = re.compile(rb't(\d+)[ "\\]')
_HEX = re.compile(rb"\\x((?:[0-9a-f]{2})+)")
_SCHEMAS = "schemaname NOT IN ('pg_catalog', 'information_schema')"


class KeptError(Exception):
    """The question could not be settled; the message says why."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What was found.

    Attributes:
        seen: tokens that the client had.
        postgres: how many of those were in PostgreSQL then.
        valkey: how many were in Valkey then; None where there was none to look into.
        after: how many were in PostgreSQL after the reply's end.
    """

    seen: int
    postgres: int
    valkey: int | None
    after: int


async def kept(target: Target, postgres_url: str, redis_url: str = "") -> Kept:
    """Asks a target on fresh stores.

    Raises:
        KeptError: The reply ended too early or was refused.
    """
    ask = await target.prepare(f"[[tokens={TOKENS} rate={RATE}]]")
    body = {"data": dict(ask.body)} if ask.form else {"json": dict(ask.body)}
    mark = f"t{SEEN - 1}".encode()
    received = b""
    during: tuple[int, int | None] | None = None
    async with httpx.AsyncClient(timeout=SECONDS, trust_env=False) as client:
        async with client.stream("POST", ask.url, headers=dict(ask.headers), **body) as answer:  # type: ignore[arg-type]
            async for chunk in answer.aiter_raw():
                received += chunk
                if during is None and mark in received:
                    during = (
                        await _in_postgres(postgres_url),
                        await asyncio.to_thread(_in_valkey, redis_url) if redis_url else None,
                    )
    if during is None:
        raise KeptError(f"{target.name}: the reply ended before token {SEEN}: {received[-300:]!r}")
    await asyncio.sleep(1)
    return Kept(SEEN, during[0], during[1], await _in_postgres(postgres_url))


def tokens_in(text: bytes) -> set[int]:
    """Returns the numbers of the first tokens that are in a text, or in bytes that it shows as hex."""
    parts = [text, *(bytes.fromhex(match[1].decode()) for match in _HEX.finditer(text))]
    found = {int(match[1]) for part in parts for match in _TOKEN.finditer(part)}
    return {number for number in found if number < SEEN}


async def _in_postgres(url: str) -> int:
    connection = await asyncpg.connect(url)
    found: set[int] = set()
    try:
        tables = await connection.fetch(
            f"SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE {_SCHEMAS}"  # noqa: S608
        )
        for (table,) in tables:
            # Names come from the catalogue, quoted by PostgreSQL.
            for (row,) in await connection.fetch(f"SELECT one::text FROM {table} one"):  # noqa: S608
                found |= tokens_in(row.encode())
    finally:
        await connection.close()
    return len(found)


def _in_valkey(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        found: set[int] = set()
        for value in _values(client):
            found |= tokens_in(value)
    return len(found)


def _values(client: Any) -> Iterator[bytes]:
    for key in client.scan_iter():
        kind = client.type(key)
        if kind == b"string":
            yield client.get(key) or b""
        elif kind == b"list":
            yield from client.lrange(key, 0, -1)
        elif kind == b"hash":
            yield from client.hvals(key)
        elif kind == b"stream":
            for _, fields in client.xrange(key):
                yield from fields.values()
