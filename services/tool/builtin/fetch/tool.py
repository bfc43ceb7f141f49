"""`fetch_page` as a tool."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from services.tool.builtin.fetch.client import TOTAL_SECONDS, Fetcher, Page
from services.tool.builtin.fetch.text import decode, html_to_text, tidy
from services.tool.builtin.fetch.url import MAX_URL
from services.tool.registry import Effect, Tool, ToolContext

_DEFAULT_CHARS = 8_000
_MAX_CHARS = 60_000


def make_fetch_page(fetcher: Fetcher) -> Tool:
    """Returns the tool over a fetcher."""

    async def fetch_page(arguments: Mapping[str, Any], context: ToolContext) -> str:
        page = await fetcher.get(str(arguments["url"]), context.progress)
        # Off the event loop: a megabyte of HTML takes a few hundred milliseconds.
        return await asyncio.to_thread(render, page, int(arguments.get("max_chars", _DEFAULT_CHARS)))

    return Tool(
        name="fetch_page",
        description=(
            "Fetches a public web page by its http(s) URL and returns its text. HTML becomes readable text; "
            "JSON and plain text come as they are."
        ),
        input_schema={
            "type": "object",
            "properties": {
                "url": {
                    "type": "string",
                    "description": "The page's URL, beginning with http:// or https://.",
                    "minLength": 1,
                    "maxLength": MAX_URL,
                },
                "max_chars": {
                    "type": "integer",
                    "description": f"How much of the text to return; default {_DEFAULT_CHARS}.",
                    "minimum": 200,
                    "maximum": _MAX_CHARS,
                },
            },
            "required": ["url"],
            "additionalProperties": False,
        },
        function=fetch_page,
        # A GET has no effect by its contract, but what it returns may change: not pure.
        effect=Effect.IDEMPOTENT,
        timeout=TOTAL_SECONDS + 5.0,
    )


def render(page: Page, max_chars: int) -> str:
    """Returns a page as text for a model: its address and title, then at most `max_chars` of its text."""
    html = page.content_type in ("text/html", "application/xhtml+xml")
    text = decode(page.body, page.charset, html)
    title = ""
    if html:
        title, text = html_to_text(text)
    elif page.content_type != "application/json":
        text = tidy(text)
    # A database column cannot hold U+0000, and no reader misses it.
    text = text.replace("\x00", "")
    head = f"URL: {page.url}\n" + (f"Title: {title}\n" if title else "")
    notes = []
    if len(text) > max_chars:
        notes.append(f"[{len(text) - max_chars} more characters are left out]")
        text = text[:max_chars].rstrip()
    if page.cut:
        notes.append("[the page is larger than 1 MiB; only its beginning was read]")
    if page.incomplete:
        notes.append("[the page ended before it was complete; only its beginning was received]")
    return "\n".join([head, text or "(the page has no text)", *notes])
