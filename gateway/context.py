"""What every route gets: the services, the settings, and who is calling."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from starlette.requests import HTTPConnection

from gateway.clients import MeshClients
from gateway.door import Door
from gateway.login import COOKIE, CookieSeal, check_origin
from gateway.settings import GatewaySettings
from gateway.streams import StreamHub
from meshkit.auth import Authenticator
from meshkit.errors import UnauthenticatedError
from meshkit.identity import Identity, identity_var
from meshkit.probes import Readiness


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway's parts, made once in `gateway.app`.

    Attributes:
        settings: Its settings.
        mesh: The services.
        hub: Owns the event streams.
        door: Refuses new runs that the mesh would refuse.
        authenticator: API key to tenant.
        seal: Opens and makes the page's cookie.
        readiness: What /ready asks.
    """

    settings: GatewaySettings
    mesh: MeshClients
    hub: StreamHub
    door: Door
    authenticator: Authenticator
    seal: CookieSeal
    readiness: Readiness

    async def identify(self, connection: HTTPConnection, method: str) -> UUID:
        """Finds the caller's tenant and acts for it from here on, in this task and those it starts.

        Args:
            connection: The request, with an API key or the page's cookie.
            method: The HTTP method; a WebSocket counts as one that changes state.

        Raises:
            UnauthenticatedError: No key, or a wrong one.
            OriginRefusedError: The cookie came with a request that is not from the page.
        """
        key = bearer(connection)
        if key is None:
            cookie = connection.cookies.get(COOKIE)
            if not cookie:
                raise UnauthenticatedError("API_KEY_MISSING", "send an API key: Authorization: Bearer <key>")
            check_origin(connection, method)
            key = self.seal.open(cookie)
        tenant_id = await self.authenticator.authenticate(key)
        identity_var.set(Identity(tenant_id=tenant_id, mesh=False))
        return tenant_id


def bearer(connection: HTTPConnection) -> str | None:
    """Returns the API key of the Authorization header, or None without such a header."""
    header = connection.headers.get("authorization")
    if header is None:
        return None
    scheme, _, key = header.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer":
        return None
    if not key or not key.isascii():
        raise UnauthenticatedError("API_KEY_INVALID", "the header must be Authorization: Bearer <key>")
    return key
