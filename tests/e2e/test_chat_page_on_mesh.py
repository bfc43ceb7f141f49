"""The chat page in a real Chromium on a whole, real mesh (with the scripted model)."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest
from playwright.async_api import Page, async_playwright, expect
from redis.asyncio import Redis

from bench.mesh import Mesh
from tests.e2e.browser import LEFT_OUT, find_or_install


@pytest.fixture
async def page(mesh: Mesh) -> AsyncIterator[Page]:
    browser = await asyncio.to_thread(find_or_install)
    if browser is None:
        pytest.skip(LEFT_OUT)
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(
            executable_path=browser.path, args=list(browser.flags), timeout=60_000
        )
        opened = await (await chromium.new_context()).new_page()
        opened.set_default_timeout(30_000)
        await opened.goto(f"{mesh.url}/#key={mesh.api_key}")
        await expect(opened.locator("#chat")).to_be_visible(timeout=30_000)
        yield opened
        await chromium.close()


async def words(page: Page) -> list[str]:
    return (await page.locator(".message.assistant .text").first.text_content() or "").split()


async def send(page: Page, text: str) -> None:
    await page.fill("#input", text)
    await page.keyboard.press("Enter")


async def test_a_reply_streams_survives_a_reload_and_is_kept(page: Page, mesh: Mesh) -> None:
    await send(page, "[[tokens=120 rate=30]]")
    await expect(page.locator(".message.assistant .text")).to_be_visible(timeout=30_000)
    await page.reload()
    await expect(page.locator("#stop")).to_be_visible(timeout=30_000)
    before = await words(page)
    assert len(before) < 120
    await expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
    streamed = await words(page)
    assert len(streamed) == 120
    assert streamed[: max(0, len(before) - 1)] == before[: max(0, len(before) - 1)]
    await page.reload()
    await expect(page.locator(".message.assistant .text")).to_be_visible(timeout=30_000)
    assert await words(page) == streamed


async def test_a_killed_gateway_is_hardly_noticed(page: Page, mesh: Mesh) -> None:
    gateways = await asyncio.to_thread(mesh.of, "gateway")
    await send(page, "[[tokens=90 rate=30]]")
    await expect(page.locator(".message.assistant .text")).to_be_visible(timeout=30_000)
    # Whichever of them serves the page: both, one after the other.
    for row in gateways:
        os.kill(row.pid, signal.SIGKILL)
        await asyncio.to_thread(mesh.wait_healthy)
    await expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    assert len(await words(page)) == 90
    await expect(page.locator(".notice.bad")).to_have_count(0)


async def test_the_stop_button_stops_the_model(page: Page, mesh: Mesh) -> None:
    await send(page, "[[tokens=2000 rate=20]]")
    await expect(page.locator(".message.assistant .text")).to_be_visible(timeout=30_000)
    await page.keyboard.press("Escape")
    await expect(page.locator(".message.assistant .notice").last).to_have_text("Stopped.", timeout=30_000)
    await expect(page.locator("#stop")).to_be_hidden()


DRAWN = "document.querySelector('#log').innerHTML.replaceAll(' open=\"\"', '')"


async def test_calls_read_the_same_live_after_a_reload_and_in_another_tab(page: Page, mesh: Mesh) -> None:
    big = 2**64 + 1
    await send(page, '[[tool=calculator {"expression":"2+2"}]]')
    await expect(page.locator(".usage")).to_have_count(1, timeout=30_000)
    await expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
    await send(page, f'[[tool=calculator {{"expression":{big}}}]]')
    await expect(page.locator(".tool")).to_have_count(2, timeout=30_000)
    await expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
    states = ["calculator completed", "calculator failed"]
    await expect(page.locator(".tool summary")).to_have_text(states)
    await expect(page.locator(".usage")).to_have_count(2)
    live = await page.evaluate(DRAWN)
    assert str(big) in live
    await page.reload()
    await expect(page.locator(".usage")).to_have_count(2, timeout=30_000)
    assert await page.evaluate(DRAWN) == live
    other = await page.context.new_page()
    await other.goto(page.url)
    await expect(other.locator(".usage")).to_have_count(2, timeout=30_000)
    assert await other.evaluate(DRAWN) == live
    await send(other, "[[tokens=5 rate=100]]")
    await expect(page.locator(".message.assistant .text").last).to_be_visible(timeout=30_000)
    await expect(page.locator(".message.user")).to_have_count(3)
    await other.close()


async def test_what_waits_for_its_turn_survives_a_reload_and_a_stop(page: Page, mesh: Mesh) -> None:
    await send(page, "[[tokens=3000 rate=20]]")
    await expect(page.locator(".message.assistant .text")).to_be_visible(timeout=30_000)
    await send(page, "[[tokens=3 rate=100]] second")
    await send(page, "[[tokens=3 rate=100]] third")
    await expect(page.locator(".waits button")).to_have_count(2, timeout=30_000)
    await page.reload()
    await expect(page.locator(".waits")).to_have_count(2, timeout=30_000)
    await page.get_by_role("button", name="Cancel it").first.click()
    notes = page.locator(".note .notice")
    await expect(notes).to_contain_text("Stopped before its turn: it got no reply.", timeout=30_000)
    await page.click("#stop")
    await expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
    await expect(notes).to_have_count(2, timeout=30_000)
    await page.reload()
    await expect(notes).to_have_count(2, timeout=30_000)
    await expect(page.locator(".message.user")).to_have_count(3)
    await page.get_by_role("button", name="Edit and send again").last.click()
    await expect(page.locator("#input")).to_have_value("[[tokens=3 rate=100]] third")
    await page.keyboard.press("Enter")
    await expect(page.locator(".message.assistant .text")).to_have_count(2, timeout=30_000)


async def test_a_run_whose_log_is_not_kept_any_more_is_shown_from_its_messages(
    page: Page, mesh: Mesh
) -> None:
    texts = page.locator(".message.assistant .text")
    await send(page, "[[echo]] long ago")
    await expect(texts).to_have_text("[[echo]] long ago", timeout=30_000)
    await expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
    await send(page, "[[echo]] lately")
    await expect(texts).to_have_count(2, timeout=30_000)
    await expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
    session = page.url.rpartition("/")[2]
    # What retention does after 30 days; by then Redis has forgotten the run, too.
    postgres = await asyncpg.connect(
        (await asyncio.to_thread(mesh.command, "env", "HERMESH_DATABASE_URL")).strip()
    )
    try:
        oldest = "SELECT run_id FROM session.run WHERE session_id = $1 ORDER BY ordinal LIMIT 1"
        run = await postgres.fetchval(oldest, UUID(session))
        await postgres.execute("DELETE FROM session.event WHERE run_id = $1", run)
    finally:
        await postgres.close()
    async with Redis.from_url(
        (await asyncio.to_thread(mesh.command, "env", "HERMESH_REDIS_URL")).strip()
    ) as redis:
        await redis.flushall()
    await page.reload()
    await expect(texts).to_have_text(["[[echo]] long ago", "[[echo]] lately"], timeout=30_000)
    await expect(page.locator(".notice", has_text="only the messages are left")).to_have_count(1)
    await expect(page.locator(".message.user")).to_have_count(2)
    await send(page, "[[echo]] now")
    await expect(texts).to_have_count(3, timeout=30_000)
