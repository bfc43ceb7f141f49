"""The real Envoy before model backends: a session keeps its backend, unless that is overloaded or gone."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from launcher import envoy
from launcher.model_pool import Balance, ModelPool
from launcher.ports import free_port

SECONDS = 20.0


@dataclass
class Backend:
    """A server that answers each request with its name, once it may."""

    name: str
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0
    server: asyncio.Server | None = None
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def cut(self) -> None:
        """Cuts the connections that there are."""
        for writer in self.writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while await reader.readline():
                while await reader.readline() != b"\r\n":
                    pass
                self.asked += 1
                await self.may_answer.wait()
                body = self.name.encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(envoy.command(config), stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)


async def until(check: Callable[[], bool]) -> None:
    while not check():  # noqa: ASYNC110 - what is waited for is in tasks and in another process
        await asyncio.sleep(0.01)


@dataclass
class Pool:
    backends: list[Backend]
    client: httpx.AsyncClient

    async def ask(self, session: str) -> str:
        answer = await self.client.get("/v1/models", headers={"x-hermesh-affinity": session})
        answer.raise_for_status()
        return answer.text


@asynccontextmanager
async def pool(balance: Balance, count: int = 3) -> AsyncIterator[Pool]:
    async with AsyncExitStack() as stack:
        backends = [Backend(f"backend-{number}") for number in range(count)]
        urls = []
        for backend in backends:
            backend.may_answer.set()
            backend.server = await asyncio.start_server(backend.serve, "127.0.0.1", 0)
            stack.callback(backend.server.close)
            urls.append(f"http://127.0.0.1:{backend.server.sockets[0].getsockname()[1]}/v1")
        made = ModelPool.of(urls, balance, free_port())
        assert made is not None
        folder = Path(tempfile.mkdtemp(prefix="hm-mp-"))
        stack.callback(shutil.rmtree, folder)
        for cluster in envoy.CLUSTERS:
            envoy.write_endpoints(folder, cluster, ())
        config = folder / "envoy.yaml"
        ports = {name: free_port() for name in ("http_port", "grpc_port", "mesh_port")}
        config.write_text(
            envoy.render_local(
                eds=folder,
                admin_socket=folder / "admin.sock",
                pool=(made.listener(), made.cluster()),
                **ports,
            )
        )
        process = stack.enter_context(running(config))
        admin = envoy.Admin(folder / "admin.sock")
        async with asyncio.timeout(SECONDS):
            while not await admin.answers():
                assert process.poll() is None
                await asyncio.sleep(0.02)
        base = made.url.removesuffix("/v1")
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=SECONDS))
        yield Pool(backends, client)


async def test_a_session_keeps_its_backend_and_sessions_are_spread() -> None:
    async with pool("session") as made:
        homes = {str(number): await made.ask(str(number)) for number in range(60)}
        assert set(homes.values()) == {backend.name for backend in made.backends}
        for session, home in homes.items():
            assert await made.ask(session) == home


async def test_a_backend_that_is_gone_costs_its_sessions_nothing_but_their_cache() -> None:
    async with pool("session") as made:
        homes = {str(number): await made.ask(str(number)) for number in range(30)}
        gone = made.backends[0]
        assert gone.server is not None
        gone.server.close()
        gone.cut()
        for session, home in homes.items():
            now = await made.ask(session)
            assert now == home or home == gone.name


async def test_a_backend_with_too_much_to_do_is_left_out() -> None:
    async with pool("session", count=2) as made:
        home = await made.ask("one")
        busy = next(backend for backend in made.backends if backend.name == home)
        busy.may_answer.clear()
        asks: list[asyncio.Task[str]] = []
        async with asyncio.TaskGroup() as group, asyncio.timeout(SECONDS):
            while sum(ask.done() for ask in asks) < 5:
                asks.append(group.create_task(made.ask("one")))
                # One by one: Envoy counts what a backend has, not what still waits for a connection.
                await until(lambda: sum(backend.asked for backend in made.backends) > len(asks))
            busy.may_answer.set()
        assert {ask.result() for ask in asks} == {backend.name for backend in made.backends}


async def test_least_request_asks_who_has_the_fewest() -> None:
    async with pool("least_request", count=2) as made:
        made.backends[0].may_answer.clear()
        asks: list[asyncio.Task[str]] = []
        async with asyncio.TaskGroup() as group, asyncio.timeout(SECONDS):
            while sum(ask.done() for ask in asks) < 10:
                asks.append(group.create_task(made.ask("one")))
                # One by one, as above.
                await until(lambda: sum(backend.asked for backend in made.backends) >= len(asks))
            made.backends[0].may_answer.set()
        assert made.backends[1].asked >= 10
