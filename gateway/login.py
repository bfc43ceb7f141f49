"""Signing in at the chat page: a sealed cookie, and the check that a request comes from the page itself."""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr
from starlette.requests import HTTPConnection
from starlette.responses import Response

from gateway.problems import OriginRefusedError
from meshkit.api_keys import tag_of
from meshkit.errors import UnauthenticatedError

COOKIE = "hermesh_login"
_VERSION = b"1"
_NONCE = 12
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class CookieSeal:
    """Seals an API key into an opaque cookie that any gateway of the mesh can open.

    The cookie is encrypted and authenticated (AES-256-GCM) with a key derived from the mesh's secret. It
    holds the API key, so that a revoked key ends every sign-in made with it. Where the key has a tag, the
    cookie is `TAG.sealed`: what stands before several meshes reads the tag, and nobody can exchange it.
    """

    def __init__(
        self, secret: SecretStr, lifetime_seconds: int, clock: Callable[[], float] = time.time
    ) -> None:
        """Derives the key. Without a mesh secret the key is random and lives as long as this process."""
        material = secret.get_secret_value().encode() or os.urandom(32)
        derive = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"hermesh gateway login cookie v1")
        self._cipher = AESGCM(derive.derive(material))
        self._lifetime = lifetime_seconds
        self._clock = clock

    def seal(self, api_key: str) -> str:
        """Returns the cookie's value."""
        body = orjson.dumps({"key": api_key, "until": int(self._clock()) + self._lifetime})
        nonce = os.urandom(_NONCE)
        tag = tag_of(api_key)
        sealed = nonce + self._cipher.encrypt(nonce, body, _bound(tag))
        text = base64.urlsafe_b64encode(sealed).decode().rstrip("=")
        return f"{tag}.{text}" if tag else text

    def open(self, value: str) -> str:
        """Returns the API key in a cookie.

        Raises:
            UnauthenticatedError: It was not made here, was changed, or is too old.
        """
        tag, _, text = value.rpartition(".")
        try:
            sealed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            body = orjson.loads(self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], _bound(tag)))
            key, until = body["key"], body["until"]
        except (binascii.Error, ValueError, InvalidTag, KeyError, TypeError):
            raise _ended() from None
        if not isinstance(key, str) or not isinstance(until, int) or until < self._clock():
            raise _ended()
        return key


def _bound(tag: str) -> bytes:
    """What is authenticated beside the sealed text."""
    return _VERSION + tag.encode()


def _ended() -> UnauthenticatedError:
    return UnauthenticatedError("API_KEY_INVALID", "the sign-in has ended; sign in again")


def set_cookie(response: Response, connection: HTTPConnection, value: str) -> None:
    """Adds the cookie; an empty value removes it."""
    response.set_cookie(
        COOKIE,
        value,
        max_age=None if value else 0,
        path="/",
        secure=_scheme(connection) == "https",
        httponly=True,
        samesite="strict",
    )


def check_origin(connection: HTTPConnection, method: str) -> None:
    """Checks that a browser sent a state-changing request, or opened a WebSocket, from our own page.

    Raises:
        OriginRefusedError: Another site's page did, or nobody knows which.
    """
    if method in _SAFE_METHODS:
        return
    origin = connection.headers.get("origin", "")
    host = connection.headers.get("host", "")
    parts = urlsplit(origin)
    # The proxy in front may speak TLS, so that only a known scheme is compared.
    if not host or parts.netloc.lower() != host.lower() or parts.scheme not in ("http", "https"):
        raise OriginRefusedError(message="a request with the page's cookie must come from the page itself")


def _scheme(connection: HTTPConnection) -> str:
    forwarded = connection.headers.get("x-forwarded-proto", "")
    return forwarded.split(",")[0].strip().lower() or connection.url.scheme
