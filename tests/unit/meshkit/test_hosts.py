from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from meshkit import hosts as module
from meshkit.hosts import Hosts, NoPrimaryError, split_hosts


@pytest.mark.parametrize(
    ("url", "each"),
    [
        ("postgresql://u:p@h:1/d", ["postgresql://u:p@h:1/d"]),
        (
            "postgresql://u:p%40,x@a:1,b:2,[::1]:3/d?sslmode=require",
            [f"postgresql://u:p%40,x@{host}/d?sslmode=require" for host in ("a:1", "b:2", "[::1]:3")],
        ),
        (
            "postgresql://u:p@/d?host=/a,/b&port=5432",
            [f"postgresql://u:p@/d?host=%2F{host}&port=5432" for host in "ab"],
        ),
        (
            "postgresql://u:p@/d?host=a,b&port=1,2",
            [f"postgresql://u:p@/d?host={host}&port={port}" for host, port in ("a1", "b2")],
        ),
    ],
)
def test_a_url_is_split_into_its_hosts(url: str, each: list[str]) -> None:
    assert split_hosts(url) == each


def test_ports_that_do_not_fit_the_hosts_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        split_hosts("postgresql:///d?host=a,b,c&port=1,2")


class Server:
    """A host as a fake: its timeline, None for a standby; what connecting raises; how long it takes."""

    def __init__(self, timeline: int | None = None, *, error: Exception | None = None, after: float = 0.0):
        self.timeline = timeline
        self.error = error
        self.after = after
        self.made: list[Fake] = []


class Fake:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.ended = False

    async def fetchval(self, *_: Any, **__: Any) -> int | None:
        return self.server.timeline

    def terminate(self) -> None:
        self.ended = True


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Server]:
    found: dict[str, Server] = {}

    async def connect(url: str, *, timeout: float, **_: Any) -> Fake:
        server = found[url.partition("//")[2].partition(":")[0]]
        async with asyncio.timeout(timeout):
            await asyncio.sleep(server.after)
        if server.error is not None:
            raise server.error
        server.made.append(Fake(server))
        return server.made[-1]

    monkeypatch.setattr(module.asyncpg, "connect", connect)
    monkeypatch.setattr(module, "_HOST_SECONDS", 0.2)
    monkeypatch.setattr(module, "_SECOND_THOUGHT", 0.05)
    return found


async def test_the_primary_is_found_wherever_it_stands(servers: dict[str, Server]) -> None:
    servers |= {"a": Server(None), "b": Server(error=OSError("away")), "c": Server(3)}
    connection: Any = await Hosts("postgresql://a:1,b:1,c:1/d").connect()
    assert connection.server is servers["c"]
    assert not connection.ended


async def test_a_frozen_host_takes_no_time_from_the_others(servers: dict[str, Server]) -> None:
    servers |= {"a": Server(1, after=30.0), "b": Server(2)}
    async with asyncio.timeout(5):
        connection: Any = await Hosts("postgresql://a:1,b:1/d").connect()
    assert connection.server is servers["b"]


async def test_of_two_primaries_the_later_promoted_one_is_taken(servers: dict[str, Server]) -> None:
    servers |= {"a": Server(1), "b": Server(2, after=0.01)}
    connection: Any = await Hosts("postgresql://a:1,b:1/d").connect()
    assert connection.server is servers["b"]


async def test_after_a_failover_the_next_connection_finds_the_new_primary(servers: dict[str, Server]) -> None:
    servers |= {"a": Server(1), "b": Server(None)}
    hosts = Hosts("postgresql://a:1,b:1/d")
    first: Any = await hosts.connect()
    assert first.server is servers["a"]
    servers |= {"a": Server(error=ConnectionRefusedError()), "b": Server(2)}
    second: Any = await hosts.connect()
    assert second.server is servers["b"]
    assert first.ended


async def test_a_look_cuts_what_waits_on_a_former_primary_that_lives(servers: dict[str, Server]) -> None:
    servers |= {"a": Server(1), "b": Server(None)}
    hosts = Hosts("postgresql://a:1,b:1/d")
    first: Any = await hosts.connect()
    await hosts.look()
    assert not first.ended
    servers["b"].timeline = 2
    await hosts.look()
    assert first.ended
    second: Any = await hosts.connect()
    assert second.server is servers["b"]


async def test_standbys_alone_are_no_primary_and_none_at_all_is_what_failed(
    servers: dict[str, Server],
) -> None:
    servers |= {"a": Server(None), "b": Server(error=OSError("away"))}
    hosts = Hosts("postgresql://a:1,b:1/d")
    with pytest.raises(NoPrimaryError):
        await hosts.connect()
    servers["a"].error = asyncpg.CannotConnectNowError("starting up")
    with pytest.raises((OSError, asyncpg.CannotConnectNowError)):
        await hosts.connect()


async def test_many_that_connect_at_once_share_one_look(servers: dict[str, Server]) -> None:
    servers |= {"a": Server(1), "b": Server(None)}
    hosts = Hosts("postgresql://a:1,b:1/d")
    await asyncio.gather(*(hosts.connect() for _ in range(8)))
    # One connection for the look.
    assert len(servers["a"].made) == 9
    assert len(servers["b"].made) == 1
