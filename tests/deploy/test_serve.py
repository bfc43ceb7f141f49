"""A real Envoy under deploy/envoy/serve.sh: what those around see of its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from launcher import envoy
from launcher.ports import free_port
from meshkit.probes import status_of
from tools.kubectl import ROOT

SERVE = ROOT / "deploy/envoy/serve.sh"
SECONDS = 30.0


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await holds():
            await asyncio.sleep(0.05)


@asynccontextmanager
async def gateway(gone: asyncio.Event) -> AsyncIterator[str]:
    """A FAKE gateway with a stream that it ends when it is told to."""
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /stream "):
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
                    await gone.wait()
                    writer.write(b"4\r\nlast\r\n0\r\n\r\n")
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        gone.set()
        await asyncio.wait_for(asyncio.gather(*serving), SECONDS)


class Served:
    """A running script with its Envoy."""

    def __init__(self, process: asyncio.subprocess.Process, ports: dict[str, int], status: int) -> None:
        self.process = process
        self.port = ports["http_port"]
        self.mesh_port = ports["mesh_port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.status = status

    async def health(self) -> int | None:
        return await status_of("127.0.0.1", self.port, "/health", 2)

    async def ready(self) -> int | None:
        return await status_of("127.0.0.1", self.status, "/ready", 2)


@asynccontextmanager
async def serving(folder: Path, upstream: str, **settings: str) -> AsyncIterator[Served]:
    """Runs the script with the configuration of one machine, and the status listener that compose has."""
    eds = folder / "eds"
    eds.mkdir()
    for cluster in envoy.CLUSTERS:
        envoy.write_endpoints(eds, cluster, [upstream] if cluster == "gateway" else ())
    admin, status = free_port(), free_port()
    ports = {name: free_port() for name in ("http_port", "grpc_port", "mesh_port")}
    address = f"{{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}"
    text = envoy.render_local(
        eds=eds,
        admin_socket=folder / "admin.sock",
        pool=envoy._status("127.0.0.1", status, address),
        **ports,
    )
    pipe = f"{{pipe: {{path: {envoy._quoted(folder / 'admin.sock')}, mode: 384}}}}"
    assert pipe in text
    config = folder / "envoy.yaml"
    config.write_text(text.replace(pipe, address))
    environment = os.environ | {
        "PATH": f"{envoy.BINARY.parent}:{os.environ['PATH']}",
        "HERMESH_ENVOY_ADMIN": f"127.0.0.1/{admin}",
        **settings,
    }
    arguments = ("-c", str(config), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning")
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "bash", str(SERVE), *arguments, env=environment, stdout=log, stderr=log, process_group=0
        )
    served = Served(process, ports, status)
    try:
        await until(lambda: _is(served.health, 200))
        yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _is(asked: Callable[[], Awaitable[Any]], wanted: Any) -> bool:
    return bool(await asked() == wanted)


async def test_it_takes_nothing_new_lets_streams_end_and_ends(tmp_path: Path) -> None:
    gone = asyncio.Event()
    times = {"HERMESH_ENVOY_NOTICE_SECONDS": "2", "HERMESH_ENVOY_DRAIN_SECONDS": "60"}
    async with (
        asyncio.timeout(SECONDS * 2),
        gateway(gone) as upstream,
        serving(tmp_path, upstream, **times) as served,
        httpx.AsyncClient(base_url=served.url, timeout=SECONDS) as client,
    ):
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert await served.ready() == 200
        async with client.stream("GET", "/stream") as response:
            body = response.aiter_text()
            assert await anext(body) == "first"
            served.process.terminate()
            # Told: at both places, and by answers that end their connection.
            await until(lambda: _is(served.ready, 503))
            assert await served.health() == 503
            answer = await client.get("/more")
            assert (answer.text, answer.headers["connection"]) == ("ok", "close")
            # Then nobody gets in any more, the mesh's own services neither: they find the next Envoy.
            await until(lambda: _is(served.health, None))
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", served.mesh_port)
            assert served.process.returncode is None
            gone.set()
            assert await anext(body) == "last"
        assert await served.process.wait() == 0
    assert "0 requests were under way" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("again", [False, True])
async def test_what_does_not_end_is_cut_at_the_limit_or_by_a_second_signal(
    tmp_path: Path, again: bool
) -> None:
    limit = "60" if again else "2"
    times = {"HERMESH_ENVOY_NOTICE_SECONDS": "1", "HERMESH_ENVOY_DRAIN_SECONDS": limit}
    async with (
        asyncio.timeout(SECONDS * 2),
        gateway(asyncio.Event()) as upstream,
        serving(tmp_path, upstream, **times) as served,
        httpx.AsyncClient(base_url=served.url, timeout=SECONDS) as client,
    ):
        async with client.stream("GET", "/stream") as response:
            body = response.aiter_text()
            assert await anext(body) == "first"
            served.process.terminate()
            await until(lambda: _is(served.ready, 503))
            if again:
                served.process.terminate()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(body)
        await served.process.wait()


async def test_an_envoy_that_ends_by_itself_ends_the_script_with_its_status(tmp_path: Path) -> None:
    async with gateway(asyncio.Event()) as upstream, serving(tmp_path, upstream) as served:
        children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        async with asyncio.timeout(SECONDS):
            assert await served.process.wait() == 128 + signal.SIGKILL
