"""The chat page in a real Chromium on a gateway whose mesh is the FAKE of tests/fakes/mesh.py.

That one can do on command what is rare: a broken stream, a reset, a question, a log that is gone. A module of
tests takes the fixtures by importing them; it has one browser, and so one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect
from prometheus_client import CollectorRegistry

from gateway.app import make_app, make_gateway
from gateway.clients import SAFE_METHODS
from gateway.server import bind, serving
from gateway.settings import GatewaySettings
from meshkit.channel import open_channel
from tests.e2e.browser import LEFT_OUT, find_or_install
from tests.fakes.mesh import API_KEY, FakeMesh, FakeRun

COMPLETED = ("run.completed", {"message_id": "", "finish_reason": "stop"})
SECONDS = 10_000


class Steps:
    """A script whose events the test sends one by one."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    def say(self, kind: str, **data: Any) -> None:
        self.queue.put_nowait((kind, data))

    def text(self, *texts: str) -> None:
        for text in texts:
            self.say("text.delta", text=text)

    def end(self) -> None:
        self.queue.put_nowait(COMPLETED)

    async def script(self, run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        while True:
            asked = asyncio.ensure_future(run.cancelled.wait())
            step = asyncio.ensure_future(self.queue.get())
            await asyncio.wait({asked, step}, return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
            if not step.done():
                step.cancel()
                yield "run.cancelled", {"reason": "stopped"}
                return
            yield step.result()


@dataclass
class Served:
    """A gateway, its fake mesh, and a signed-in page."""

    mesh: FakeMesh
    url: str
    gateway: Any
    restart: Callable[[], Any]
    errors: list[str] = field(default_factory=list)


@pytest_asyncio.fixture(loop_scope="module")
async def served() -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(FakeMesh())
        settings = GatewaySettings(mesh_address=mesh.address, mesh_token="secret")
        channel = await stack.enter_async_context(open_channel(settings, safe=SAFE_METHODS))

        async def serve(listen: str, inside: AsyncExitStack) -> tuple[Any, str]:
            registry = CollectorRegistry()
            gateway = make_gateway(settings, channel, registry=registry)
            await inside.enter_async_context(gateway.hub)
            sock = bind(listen)
            port = sock.getsockname()[1]
            await inside.enter_async_context(serving(make_app(gateway, registry=registry), sock, 1.0))
            return gateway, f"127.0.0.1:{port}"

        inside = await stack.enter_async_context(AsyncExitStack())
        gateway, address = await serve("127.0.0.1:0", inside)

        async def restart() -> None:
            """Ends the gateway and starts another one at the same address."""
            found.gateway.hub.drain()
            await inside.aclose()
            found.gateway, _ = await serve(address, inside)

        found = Served(mesh, f"http://{address}", gateway, restart)
        yield found
        # Pages are still open, and follow their conversations.
        found.gateway.hub.drain()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    browser = await asyncio.to_thread(find_or_install)
    if browser is None:
        pytest.skip(LEFT_OUT)
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(
            executable_path=browser.path, args=list(browser.flags), timeout=60_000
        )
        yield launched
        await launched.close()


@pytest_asyncio.fixture(loop_scope="module")
async def context(chromium: Browser) -> AsyncIterator[BrowserContext]:
    made = await chromium.new_context(viewport={"width": 1200, "height": 800})
    made.set_default_timeout(SECONDS)
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(context: BrowserContext, served: Served) -> AsyncIterator[Page]:
    """The page, signed in by a link. Whatever breaks the page's policy or throws in it fails the test."""
    opened = await context.new_page()
    opened.on("pageerror", lambda error: served.errors.append(str(error)))
    opened.on(
        "console",
        lambda message: (
            served.errors.append(message.text) if "Content Security Policy" in message.text else None
        ),
    )
    await opened.goto(f"{served.url}/#key={API_KEY}")
    await expect(opened.locator("#chat")).to_be_visible()
    yield opened
    assert served.errors == []


async def send(page: Page, text: str) -> None:
    await page.fill("#input", text)
    await page.keyboard.press("Enter")
