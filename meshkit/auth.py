"""API keys to tenants: the port, and the adapter that asks the session service through the mesh."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol
from uuid import UUID

import grpc
import grpc.aio

from hermesh.session.v1 import session_internal_service_pb2, session_internal_service_pb2_grpc
from meshkit.channel import mesh_metadata
from meshkit.errors import HermeshError, InternalError, UnauthenticatedError, from_rpc_error
from meshkit.settings import MeshSettings

POSITIVE_TTL = 30.0
NEGATIVE_TTL = 5.0
MAX_ENTRIES = 10_000
MAX_KEY_LENGTH = 500
_LOOKUP_TIMEOUT = 5.0


class Authenticator(Protocol):
    """Turns an API key into its tenant."""

    async def authenticate(self, api_key: str) -> UUID:
        """Returns the tenant of a key.

        Raises:
            UnauthenticatedError: The key is unknown or was revoked.
            UnavailableError: It cannot be looked up now.
        """
        ...


def hash_key(api_key: str) -> str:
    """Returns the SHA-256 of a key as hex: its form at rest. Keys are random, so that it needs no salt."""
    return hashlib.sha256(api_key.encode("utf-8", "surrogatepass")).hexdigest()


def invalid_key() -> UnauthenticatedError:
    """Returns the one error for a key that is unknown, revoked or malformed."""
    return UnauthenticatedError("API_KEY_INVALID", "the API key is not valid")


class CachingAuthenticator:
    """Remembers answers for a while: a tenant for 30 s, a refusal for 5 s.

    So a revoked key works for at most 30 s more. The cache holds hashes, never keys, and at most
    `max_entries` of them. Callers that ask for the same key at once share one lookup. A lookup that could not
    be made is not remembered.
    """

    def __init__(
        self,
        inner: Authenticator,
        *,
        positive_ttl: float = POSITIVE_TTL,
        negative_ttl: float = NEGATIVE_TTL,
        max_entries: int = MAX_ENTRIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Decorates `inner`."""
        self._inner = inner
        self._positive_ttl = positive_ttl
        self._negative_ttl = negative_ttl
        self._max_entries = max_entries
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, UUID | None]] = OrderedDict()
        self._lookups: dict[str, asyncio.Future[UUID | None]] = {}

    async def authenticate(self, api_key: str) -> UUID:
        """Returns the tenant of a key; see `Authenticator.authenticate`."""
        if not api_key or len(api_key) > MAX_KEY_LENGTH:
            raise invalid_key()
        key = hash_key(api_key)
        while True:
            entry = self._entries.get(key)
            if entry is not None and entry[0] > self._clock():
                return _tenant(entry[1])
            lookup = self._lookups.get(key)
            if lookup is None:
                return _tenant(await self._look_up(key, api_key))
            # `wait` neither cancels the lookup with a follower nor a follower with the lookup.
            await asyncio.wait((lookup,))
            if not lookup.cancelled():
                return _tenant(lookup.result())

    async def _look_up(self, key: str, api_key: str) -> UUID | None:
        future: asyncio.Future[UUID | None] = asyncio.get_running_loop().create_future()
        self._lookups[key] = future
        try:
            try:
                tenant_id: UUID | None = await self._inner.authenticate(api_key)
            except UnauthenticatedError:
                tenant_id = None
            self._remember(key, tenant_id)
            future.set_result(tenant_id)
            return tenant_id
        except HermeshError as error:
            future.set_exception(error)
            # Followers, if any, take it; without one nobody would.
            future.exception()
            raise
        finally:
            if not future.done():
                future.cancel()
            del self._lookups[key]

    def _remember(self, key: str, tenant_id: UUID | None) -> None:
        ttl = self._positive_ttl if tenant_id is not None else self._negative_ttl
        self._entries[key] = (self._clock() + ttl, tenant_id)
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)


def _tenant(tenant_id: UUID | None) -> UUID:
    if tenant_id is None:
        raise invalid_key()
    return tenant_id


class _SessionAuthenticator:
    """Asks SessionInternalService.Authenticate on every call."""

    def __init__(self, channel: grpc.aio.Channel, settings: MeshSettings) -> None:
        self._stub = session_internal_service_pb2_grpc.SessionInternalServiceStub(channel)
        self._metadata = mesh_metadata(settings)

    async def authenticate(self, api_key: str) -> UUID:
        request = session_internal_service_pb2.AuthenticateRequest(api_key=api_key)
        try:
            response = await self._stub.Authenticate(
                request, metadata=self._metadata, timeout=_LOOKUP_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        try:
            return UUID(response.tenant_id)
        except ValueError as error:
            raise InternalError() from error


class MeshAuthenticator(CachingAuthenticator):
    """Asks the session service through the mesh, and remembers; see `CachingAuthenticator`."""

    def __init__(self, channel: grpc.aio.Channel, settings: MeshSettings) -> None:
        """Uses a channel of `open_channel`, which stays the caller's."""
        super().__init__(_SessionAuthenticator(channel, settings))
