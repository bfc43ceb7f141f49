"""API keys to tenants: the port, and the adapter that asks the session service through the mesh."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol
from uuid import UUID

import grpc
import grpc.aio
from prometheus_client import Counter

from hermesh.session.v1 import session_internal_service_pb2, session_internal_service_pb2_grpc
from meshkit.channel import mesh_metadata
from meshkit.context import client_var
from meshkit.errors import (
    HermeshError,
    InternalError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    from_rpc_error,
)
from meshkit.settings import MeshSettings
from meshkit.throttle import Throttle

POSITIVE_TTL = 30.0
NEGATIVE_TTL = 5.0
MAX_ENTRIES = 10_000
MAX_KEY_LENGTH = 500
MAX_LOOKUPS = 256
# A person who mistypes, and a fleet that was given a wrong key, stay below these.
UNKNOWN_RATE = 5.0
UNKNOWN_BURST = 50
_LOOKUP_TIMEOUT = 5.0
_BUSY_RETRY_MS = 500

_LOOKUPS = Counter(
    "hermesh_key_lookups",
    "API keys that were not simply remembered as good: found, refused, refused_again (remembered as wrong), "
    "throttled (too many unknown ones from one address) and failed.",
    ["outcome"],
)


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

    So a revoked key works for at most 30 s more. The caches hold hashes, never keys, and at most
    `max_entries` each. Callers that ask for the same key at once share one look-up. A look-up that could not
    be made is not remembered.

    Wrong keys are no harm to right ones. Refusals have a cache of their own. Keys that nobody has shown here
    yet are looked up only so often for each client address (`context.client_var`); a right one does not
    count, and one that was right here before is never kept waiting, also when its answer is too old to be
    used.
    """

    def __init__(
        self,
        inner: Authenticator,
        *,
        positive_ttl: float = POSITIVE_TTL,
        negative_ttl: float = NEGATIVE_TTL,
        max_entries: int = MAX_ENTRIES,
        max_lookups: int = MAX_LOOKUPS,
        rate: float = UNKNOWN_RATE,
        burst: int = UNKNOWN_BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Decorates `inner`.

        Args:
            inner: Looks keys up.
            positive_ttl: Seconds for which a tenant is remembered.
            negative_ttl: Seconds for which a refusal is remembered.
            max_entries: Most right keys, and most wrong ones, that are remembered.
            max_lookups: Most look-ups at once.
            rate: How many unknown keys a client address may show a second, once its burst is used up.
            burst: How many it may show at once.
            clock: Seconds that only grow.
        """
        self._inner = inner
        self._positive_ttl = positive_ttl
        self._negative_ttl = negative_ttl
        self._max_entries = max_entries
        self._max_lookups = max_lookups
        self._clock = clock
        self._good: OrderedDict[str, tuple[float, UUID]] = OrderedDict()
        self._bad: OrderedDict[str, float] = OrderedDict()
        self._unknown = Throttle(rate, burst, clock=clock)
        self._lookups: dict[str, asyncio.Future[UUID | None]] = {}

    async def authenticate(self, api_key: str) -> UUID:
        """Returns the tenant of a key.

        Raises:
            UnauthenticatedError: The key is unknown or was revoked.
            ResourceExhaustedError: TOO_MANY_WRONG_KEYS: too many unknown keys came from the client's address.
            UnavailableError: It cannot be looked up now.
        """
        if not api_key or len(api_key) > MAX_KEY_LENGTH:
            raise invalid_key()
        key = hash_key(api_key)
        while True:
            now = self._clock()
            good = self._good.get(key)
            if good is not None and good[0] > now:
                return good[1]
            if self._bad.get(key, now) > now:
                _LOOKUPS.labels("refused_again").inc()
                raise invalid_key()
            lookup = self._lookups.get(key)
            if lookup is None:
                return _tenant(await self._look_up(key, api_key, known=good is not None))
            # `wait` neither cancels the lookup with a follower nor a follower with the lookup.
            await asyncio.wait((lookup,))
            if not lookup.cancelled():
                return _tenant(lookup.result())

    async def _look_up(self, key: str, api_key: str, *, known: bool) -> UUID | None:
        address = client_var.get()
        if not known:
            self._admit(address)
        future: asyncio.Future[UUID | None] = asyncio.get_running_loop().create_future()
        self._lookups[key] = future
        try:
            try:
                tenant_id: UUID | None = await self._inner.authenticate(api_key)
            except UnauthenticatedError:
                tenant_id = None
            self._remember(key, tenant_id)
            if tenant_id is None:
                # Paid for only now: right keys cost nothing, however many come at once.
                self._unknown.take(address)
            future.set_result(tenant_id)
            return tenant_id
        except HermeshError as error:
            _LOOKUPS.labels("failed").inc()
            future.set_exception(error)
            # Followers, if any, take it; without one nobody would.
            future.exception()
            raise
        finally:
            if not future.done():
                future.cancel()
            del self._lookups[key]

    def _admit(self, address: str) -> None:
        """Lets an unknown key be looked up, or raises."""
        wait = self._unknown.wait(address)
        if wait > 0:
            _LOOKUPS.labels("throttled").inc()
            raise ResourceExhaustedError(
                "TOO_MANY_WRONG_KEYS",
                "too many API keys that are not known came from your address; try again later",
                retry_after_ms=math.ceil(wait * 1000),
            )
        if len(self._lookups) >= self._max_lookups:
            _LOOKUPS.labels("failed").inc()
            raise UnavailableError(
                message="too many API keys are being looked up; try again", retry_after_ms=_BUSY_RETRY_MS
            )

    def _remember(self, key: str, tenant_id: UUID | None) -> None:
        if tenant_id is None:
            _LOOKUPS.labels("refused").inc()
            self._good.pop(key, None)
            self._bad[key] = self._clock() + self._negative_ttl
            self._bad.move_to_end(key)
            while len(self._bad) > self._max_entries:
                self._bad.popitem(last=False)
            return
        _LOOKUPS.labels("found").inc()
        self._bad.pop(key, None)
        self._good[key] = (self._clock() + self._positive_ttl, tenant_id)
        self._good.move_to_end(key)
        while len(self._good) > self._max_entries:
            self._good.popitem(last=False)


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
