"""The cells' edge in a real Envoy: whose request goes where, and what is said of a cell that is away."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from pydantic import SecretStr

from gateway.login import COOKIE, CookieSeal
from launcher import envoy
from launcher.cells import edge, table
from launcher.cells.table import Cells
from launcher.ports import free_port
from meshkit.api_keys import make_key
from meshkit.errors import from_rpc_error
from tests.integration.launcher.envoy_kit import SECONDS, SERVING, Replica

ACME, BETA = make_key("acme"), make_key("beta")
OLD = "hm_" + "Ab-c_d" * 8
GET_RUN = "/hermesh.session.v1.SessionService/GetRun"
SEAL = CookieSeal(SecretStr("secret"), 600)


class Web:
    """The HTTP side of a cell: says which one it is and what came; it takes an upgrade, too."""

    def __init__(self, cell: str) -> None:
        self._cell = cell
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
                if lines.get("upgrade") == "websocket":
                    writer.write(
                        b"HTTP/1.1 101 Switching Protocols\r\n"
                        b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n"
                    )
                    writer.write(self._cell.encode())
                    continue
                body = json.dumps({"cell": self._cell, "headers": lines}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()


@dataclass
class Served:
    """An edge with two cells behind it."""

    cells: Cells
    webs: dict[str, Web]
    replicas: dict[str, Replica]
    url: str

    async def ask(self, key: str = "", **headers: str) -> httpx.Response:
        if key:
            headers["authorization"] = f"Bearer {key}"
        async with httpx.AsyncClient(base_url=self.url, timeout=SECONDS) as client:
            return await client.get("/v1/sessions", headers=headers)

    async def cell(self, key: str = "", **headers: str) -> str:
        answer = await self.ask(key, **headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["cell"])

    async def call(self, *metadata: tuple[str, str]) -> str:
        async with grpc.aio.insecure_channel(self.cells.grpc) as channel:
            answer = await channel.unary_unary(GET_RUN)(b"", metadata=metadata, timeout=SECONDS)
        return str(json.loads(answer)["replica"])

    async def until(self, key: str, wanted: str) -> None:
        async with asyncio.timeout(SECONDS):
            while True:
                found = (await self.ask(key)).json().get("cell"), await self.call(bearer(key))
                if found == (wanted, wanted):
                    return
                await asyncio.sleep(0.02)


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


@contextmanager
def running(cells: Cells) -> Iterator[None]:
    config = cells.folders[0] / edge.CONFIG
    envoy.validate(config)
    with (cells.folders[0] / "log").open("wb") as log:
        process = subprocess.Popen(envoy.command(config), stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        webs = {name: Web(name) for name in "ab"}
        replicas = {name: Replica(name) for name in "ab"}
        for name in "ab":
            await webs[name].start()
            stack.callback(webs[name].stop)
            await replicas[name].health.set("", SERVING)
            await replicas[name].server.start()
            stack.push_async_callback(replicas[name].server.stop, 0)
        cells = table.Cells(
            tmp_path / table.FILE,
            "a",
            {name: table.Cell(name, (webs[name].address,), (replicas[name].address,)) for name in "ab"},
            f"127.0.0.1:{free_port()}",
            f"127.0.0.1:{free_port()}",
            (tmp_path / "edge",),
        )
        edge.write(cells, {"beta": "b"})
        stack.enter_context(running(cells))
        found = Served(cells, webs, replicas, f"http://{cells.http}")
        async with asyncio.timeout(SECONDS):
            for key in (ACME, BETA):
                wanted = "a" if key == ACME else "b"
                while True:
                    try:
                        await found.until(key, wanted)
                        break
                    except (httpx.HTTPError, grpc.aio.AioRpcError):
                        await asyncio.sleep(0.02)
        yield found


async def test_a_key_finds_its_tenants_cell_however_it_is_sent(served: Served) -> None:
    assert await served.cell(ACME) == "a"
    assert await served.cell(BETA) == "b"
    assert await served.cell(authorization=f"bearer  {BETA}") == "b"
    # No tag, an unknown one, no key at all: the default cell.
    for key in (OLD, make_key("nobody"), "hm_" + "0" * 48, "hm_beta", "hm_Beta_x", ""):
        assert await served.cell(key) == "a", key
    assert await served.call(bearer(ACME)) == "a"
    assert await served.call(bearer(BETA)) == "b"
    assert await served.call() == "a"


async def test_a_cookie_shows_its_tenants_tag(served: Served) -> None:
    assert await served.cell(cookie=f"{COOKIE}={SEAL.seal(BETA)}; other=1") == "b"
    assert await served.cell(cookie=f"x=beta.1; {COOKIE}={SEAL.seal(ACME)}") == "a"
    assert await served.cell(cookie=f"{COOKIE}={SEAL.seal(OLD)}") == "a"
    # The key counts where there are both, also one without a tag.
    assert await served.cell(BETA, cookie=f"{COOKIE}={SEAL.seal(ACME)}") == "b"
    assert await served.cell(OLD, cookie=f"{COOKIE}={SEAL.seal(BETA)}") == "a"


async def test_no_client_can_choose_a_cell(served: Served) -> None:
    forged = {"x-hermesh-tag": "beta", "x-hermesh-tenant": "t", "x-hermesh-mesh": "m"}
    for key, own in ((ACME, "a"), (BETA, "b"), ("", "a")):
        answer = (await served.ask(key, **forged)).json()
        assert answer["cell"] == own
        assert answer["headers"]["x-hermesh-tag"] == {"a": "acme", "b": "beta"}[own] if key else "-"
        assert {"x-hermesh-tenant", "x-hermesh-mesh"}.isdisjoint(answer["headers"])
    assert await served.call(bearer(ACME), ("x-hermesh-tag", "beta")) == "a"


async def test_a_websocket_goes_to_its_cell(served: Served) -> None:
    reader, writer = await asyncio.open_connection(*served.cells.http.split(":"))
    try:
        writer.write(
            f"GET /v1/sessions/x/ws HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            f"authorization: Bearer {BETA}\r\n\r\n".encode()
        )
        async with asyncio.timeout(SECONDS):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            assert await reader.readexactly(1) == b"b"
    finally:
        writer.close()


async def test_a_move_counts_without_a_restart(served: Served) -> None:
    edge.write(served.cells, {"beta": "b", "acme": "b"})
    await served.until(ACME, "b")
    edge.write(served.cells, {"beta": "a"})
    await served.until(BETA, "a")
    await served.until(ACME, "a")


async def test_ten_thousand_tenants_are_looked_up_as_one_is(served: Served) -> None:
    many = {f"tenant-{number}": "b" for number in range(10_000)}
    edge.write(served.cells, many)
    await served.until(make_key("tenant-9999"), "b")
    assert await served.cell(make_key("tenant-0")) == "b"
    assert await served.cell(BETA) == "a"


async def test_a_cell_that_is_away_is_named_to_its_own_tenants_only(served: Served) -> None:
    served.webs["b"].stop()
    await served.replicas["b"].server.stop(0)
    answer = await served.ask(BETA)
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["retry-after"] == "1"
    problem: dict[str, Any] = answer.json()
    assert problem["reason"] == "CELL_UNAVAILABLE"
    assert "the cell of tenant beta cannot be reached; nothing was done" in problem["detail"]
    assert problem["request_id"]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served.call(bearer(BETA))
    error = from_rpc_error(raised.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "CELL_UNAVAILABLE")
    assert error.retry_after_ms == 1000
    assert "tenant beta" in (raised.value.details() or "")
    async with httpx.AsyncClient(base_url=served.url, timeout=SECONDS) as client:
        chat = await client.post("/v1/chat/completions", headers={"authorization": f"Bearer {BETA}"}, json={})
        assert (chat.status_code, chat.json()["error"]["code"]) == (503, "cell_unavailable")
        assert (await client.get("/health")).json() == {"status": "ok"}
    assert await served.cell(ACME) == "a"
    assert await served.call(bearer(ACME)) == "a"


async def test_a_default_cell_that_is_away_is_called_so(served: Served) -> None:
    served.webs["a"].stop()
    problem = (await served.ask(OLD)).json()
    assert problem["reason"] == "CELL_UNAVAILABLE"
    assert problem["detail"].startswith(
        "the default cell, which serves keys without a tenant's tag, cannot be"
    )
    assert await served.cell(BETA) == "b"


async def test_a_full_cell_says_so_and_the_other_one_serves(served: Served) -> None:
    b = replace(served.cells.cells["b"], max_requests=1)
    full = replace(served.cells, cells={**served.cells.cells, "b": b})
    edge.write(full, {"beta": "b"})
    async with asyncio.timeout(SECONDS):
        while True:
            answers = await asyncio.gather(*(served.ask(BETA) for _ in range(20)))
            refused = [answer for answer in answers if answer.status_code != 200]
            if refused:
                break
    for answer in refused:
        assert (answer.status_code, answer.json()["reason"]) == (429, "OVERLOADED")
        assert "the cell of tenant beta is full" in answer.json()["detail"]
    assert await served.cell(ACME) == "a"
