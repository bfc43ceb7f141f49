"""Signing in at the chat page."""

from __future__ import annotations

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway.body import StrictModel
from gateway.context import Gateway
from gateway.endpoints import Answer, Endpoint, json_response, read_model
from gateway.login import COOKIE, check_origin, set_cookie
from meshkit.errors import UnauthenticatedError

# Nobody has shown a key yet: a key and the JSON around it, and no more, is read.
MAX_LOGIN_BODY = 4 * 1024


class Login(StrictModel):
    """What a person signs in with."""

    api_key: str = Field(min_length=1, max_length=500, description="An API key.")


class LoginState(BaseModel):
    """Whether the page is signed in."""

    signed_in: bool


async def login(gateway: Gateway, request: Request) -> ASGIApp:
    """POST /auth/login."""
    check_origin(request, "POST")
    body = await read_model(gateway, request, Login, limit=MAX_LOGIN_BODY)
    key = body.api_key.strip()
    await gateway.authenticator.authenticate(key)
    response = Response(status_code=204)
    set_cookie(response, request, gateway.seal.seal(key))
    return response


async def logout(gateway: Gateway, request: Request) -> ASGIApp:
    """POST /auth/logout."""
    check_origin(request, "POST")
    response = Response(status_code=204)
    set_cookie(response, request, "")
    return response


async def state(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /auth/session."""
    cookie = request.cookies.get(COOKIE)
    signed_in = False
    if cookie:
        try:
            await gateway.authenticator.authenticate(gateway.seal.open(cookie))
            signed_in = True
        except UnauthenticatedError:
            signed_in = False
    response = json_response({"signed_in": signed_in}, headers={"cache-control": "no-store"})
    if cookie and not signed_in:
        set_cookie(response, request, "")
    return response


endpoints = [
    Endpoint(
        "POST",
        "/auth/login",
        login,
        "Signs the chat page in",
        {204: Answer("Signed in: the cookie stands for the key from here on.")},
        body=Login,
        tag="page",
        public=True,
        description="For browsers: the Origin header must be the gateway's own.",
    ),
    Endpoint(
        "POST",
        "/auth/logout",
        logout,
        "Signs the chat page out",
        {204: Answer("The cookie is gone.")},
        tag="page",
        public=True,
    ),
    Endpoint(
        "GET",
        "/auth/session",
        state,
        "Tells whether the chat page is signed in",
        {200: Answer("Whether the cookie is good.", LoginState)},
        tag="page",
        public=True,
    ),
]
