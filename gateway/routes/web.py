"""The chat page and the documentation: files that are part of the package, under a strict policy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway.context import Gateway
from gateway.endpoints import Answer, Endpoint

FOLDER = Path(__file__).parent.parent / "web"
# Nothing from elsewhere, nothing inline, no frame around the page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
} | {f"/{path.name}": (path.name, "text/javascript; charset=utf-8") for path in sorted(FOLDER.glob("*.js"))}


class StaticBody:
    """Handles GET of one fixed body."""

    def __init__(self, body: bytes, media_type: str) -> None:
        """Holds the body in memory: it is small, and it never changes while the process lives."""
        self._body = body
        self._headers = {
            **HEADERS,
            "content-type": media_type,
            "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        }

    async def __call__(self, gateway: Gateway, request: Request) -> ASGIApp:
        """Answers with the body, or 304."""
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers)


def _endpoint(path: str, body: bytes, media_type: str, summary: str) -> Endpoint:
    return Endpoint(
        "GET",
        path,
        StaticBody(body, media_type),
        summary,
        {200: Answer("The file.", media_type=media_type.partition(";")[0])},
        public=True,
        tag="page",
    )


def page_endpoints() -> list[Endpoint]:
    """Returns the endpoints of the chat page's files."""
    return [
        _endpoint(path, (FOLDER / name).read_bytes(), media_type, f"The chat page: {name}")
        for path, (name, media_type) in _FILES.items()
    ]


def docs_endpoints(spec: dict[str, Any], page: str) -> list[Endpoint]:
    """Returns the endpoints of the OpenAPI document and of the page that shows it."""
    return [
        _endpoint("/openapi.json", orjson.dumps(spec), "application/json", "The OpenAPI document"),
        _endpoint("/docs", page.encode(), "text/html; charset=utf-8", "The documentation"),
    ]
