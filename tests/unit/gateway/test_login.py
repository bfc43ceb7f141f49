"""The page's cookie. The mesh behind is the FAKE of tests/fakes/mesh.py."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from gateway.login import COOKIE, CookieSeal
from gateway.routes.web import FOLDER, POLICY
from meshkit.api_keys import make_key
from meshkit.errors import UnauthenticatedError
from tests.fakes.mesh import API_KEY


@pytest.fixture
async def browser(served: Any) -> Any:
    """A client without a key, as a browser is."""
    async with httpx.AsyncClient(base_url=served.url, timeout=10) as client:
        yield client


async def sign_in(browser: httpx.AsyncClient, url: str) -> None:
    answer = await browser.post("/auth/login", json={"api_key": API_KEY}, headers={"origin": url})
    assert answer.status_code == 204
    browser.headers.pop("origin", None)


async def test_a_sign_in_is_a_cookie_that_stands_for_the_key(served: Any, browser: httpx.AsyncClient) -> None:
    assert (await browser.get("/auth/session")).json() == {"signed_in": False}
    answer = await browser.post("/auth/login", json={"api_key": API_KEY}, headers={"origin": served.url})
    header = answer.headers["set-cookie"]
    assert "HttpOnly" in header
    assert "SameSite=strict" in header
    assert "Path=/" in header
    assert "Secure" not in header
    assert API_KEY not in header
    assert (await browser.get("/auth/session")).json() == {"signed_in": True}
    assert (await browser.get("/v1/sessions")).status_code == 200


async def test_behind_tls_the_cookie_is_secure(served: Any, browser: httpx.AsyncClient) -> None:
    headers = {"origin": served.url.replace("http:", "https:"), "x-forwarded-proto": "https"}
    answer = await browser.post("/auth/login", json={"api_key": API_KEY}, headers=headers)
    assert "Secure" in answer.headers["set-cookie"]


async def test_a_wrong_key_gets_no_cookie(served: Any, browser: httpx.AsyncClient) -> None:
    answer = await browser.post("/auth/login", json={"api_key": "hm_no"}, headers={"origin": served.url})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://127.0.0.1:1", "https://"])
async def test_another_sites_request_is_refused(
    served: Any, browser: httpx.AsyncClient, origin: str | None
) -> None:
    headers = {"origin": origin} if origin else {}
    refused = await browser.post("/auth/login", json={"api_key": API_KEY}, headers=headers)
    assert refused.status_code == 403
    assert refused.json()["reason"] == "ORIGIN_REFUSED"
    await sign_in(browser, served.url)
    session = served.mesh.add_session("mine")
    for method, path in (
        ("POST", "/v1/sessions"),
        ("POST", f"/v1/sessions/{session.session_id}/runs"),
        ("PATCH", f"/v1/sessions/{session.session_id}"),
        ("DELETE", f"/v1/sessions/{session.session_id}"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/auth/logout"),
    ):
        answer = await browser.request(method, path, json={"title": "x"}, headers=headers)
        assert answer.status_code == 403, path
    assert list(served.mesh.sessions) == [session.session_id]
    own = await browser.patch(
        f"/v1/sessions/{session.session_id}", json={"title": "x"}, headers={"origin": served.url}
    )
    assert own.status_code == 200


async def test_a_key_in_the_header_needs_no_origin(served: Any) -> None:
    answer = await served.client.post("/v1/sessions", json={}, headers={"origin": "http://evil.example"})
    assert answer.status_code == 201


async def test_signing_out_removes_the_cookie(served: Any, browser: httpx.AsyncClient) -> None:
    await sign_in(browser, served.url)
    assert (await browser.post("/auth/logout", headers={"origin": served.url})).status_code == 204
    assert COOKIE not in browser.cookies
    answer = await browser.get("/v1/sessions")
    assert (answer.status_code, answer.json()["reason"]) == (401, "API_KEY_MISSING")


async def test_every_gateway_of_the_mesh_opens_the_cookie(start: Any) -> None:
    first, second = await start(), await start()
    async with httpx.AsyncClient(timeout=10) as browser:
        await browser.post(
            f"{first.url}/auth/login", json={"api_key": API_KEY}, headers={"origin": first.url}
        )
        assert (await browser.get(f"{second.url}/v1/sessions")).status_code == 200


@pytest.mark.parametrize("header", ["", "Basic abc"])
async def test_no_key_is_told_from_a_wrong_one(browser: httpx.AsyncClient, header: str) -> None:
    answer = await browser.get("/v1/sessions", headers={"authorization": header} if header else {})
    assert (answer.status_code, answer.json()["reason"]) == (401, "API_KEY_MISSING")
    for wrong in ("Bearer", "bearer hm_wrong", "Bearer hm_wrong"):
        answer = await browser.get("/v1/sessions", headers={"authorization": wrong})
        assert (answer.status_code, answer.json()["reason"]) == (401, "API_KEY_INVALID")
        assert answer.headers["www-authenticate"] == 'Bearer realm="hermesh"'


def test_a_cookie_that_was_changed_or_is_too_old_is_refused() -> None:
    now = 1000.0
    seal = CookieSeal(SecretStr("secret"), 60, clock=lambda: now)
    value = seal.seal(API_KEY)
    assert seal.open(value) == API_KEY
    assert seal.seal(API_KEY) != value
    for bad in (
        "",
        "x",
        "é",
        value[:-2],
        value[:10] + ("A" if value[10] != "A" else "B") + value[11:],
        "A" * 80,
    ):
        with pytest.raises(UnauthenticatedError):
            seal.open(bad)
    with pytest.raises(UnauthenticatedError):
        CookieSeal(SecretStr("other"), 60).open(value)
    now = 1061.0
    with pytest.raises(UnauthenticatedError):
        seal.open(value)


def test_a_cookie_shows_its_keys_tag_and_no_other_one() -> None:
    seal = CookieSeal(SecretStr("secret"), 60)
    key = make_key("acme")
    value = seal.seal(key)
    assert value.startswith("acme.")
    assert value.count(".") == 1
    assert seal.open(value) == key
    sealed = value.removeprefix("acme.")
    for bad in (
        sealed,
        f".{sealed}",
        f"beta.{sealed}",
        f"acme.acme.{sealed}",
        f"ACME.{sealed}",
        f"acmé.{sealed}",
    ):
        with pytest.raises(UnauthenticatedError):
            seal.open(bad)
    plain = seal.seal(API_KEY)
    assert "." not in plain
    with pytest.raises(UnauthenticatedError):
        seal.open(f"acme.{plain}")


async def test_the_page_is_served_under_a_strict_policy(browser: httpx.AsyncClient) -> None:
    for path, kind in (
        ("/", "text/html"),
        *((f"/{path.name}", "text/javascript") for path in FOLDER.glob("*.js")),
        ("/app.css", "text/css"),
        ("/favicon.svg", "image/svg+xml"),
        ("/docs", "text/html"),
        ("/openapi.json", "application/json"),
    ):
        answer = await browser.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = await browser.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304
    assert "unsafe" not in POLICY
    page = (await browser.get("/")).text
    # Nothing inline and nothing from elsewhere, which the policy would refuse.
    assert "style=" not in page
    assert "onclick" not in page
    assert "http" not in page
