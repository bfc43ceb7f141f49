"""gRPC channels: the one place for their options, metadata, deadlines and retries.

A channel here is a thin wrapper over a grpc.aio channel. gRPC's own client interceptors would put a queue and
another generator under every message of a stream; wrapping the multicallables touches a call once, when it
begins.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar
from uuid import UUID

import grpc
import grpc.aio

from meshkit import tracing
from meshkit.context import REQUEST_ID_KEY, current_request_id, remaining
from meshkit.identity import MESH_TOKEN_KEY, TENANT_KEY, current_identity
from meshkit.settings import MeshSettings

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
UNARY_TIMEOUT = 10.0
# Names the session of a run to a load balancer that keeps a session's runs together; nothing else reads it.
SESSION_KEY = "x-hermesh-session"

Metadata = tuple[tuple[str, str | bytes], ...]


class _Cancellable(Protocol):
    def cancel(self) -> bool: ...


C = TypeVar("C", bound=_Cancellable)


def channel_options(safe: Iterable[str] = ()) -> list[tuple[str, Any]]:
    """Returns the channel arguments of every client in the mesh.

    Args:
        safe: Unary read-only methods that may be tried again, as `package.Service/Method`.
    """
    methods = sorted(safe)
    config: dict[str, Any] = {}
    if methods:
        config["methodConfig"] = [
            {
                "name": [_method_name(method) for method in methods],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # Off except for the safe list: a hidden second try of a tool call would repeat its side effect.
        ("grpc.enable_retries", 1 if methods else 0),
        ("grpc.service_config", json.dumps(config)),
        # Notice a silently dead peer in 20 s, also between calls of a long stream.
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        # After a restart of Envoy the first call should not wait for gRPC's default of a second and more.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Where a name leads to several Envoys, those that came since are found as those before end: by
        # default no name is asked for twice within 30 s, and calls fail meanwhile.
        ("grpc.dns_min_time_between_resolutions_ms", 500),
        # Channels to the same address keep connections of their own, which Envoy spreads over its workers.
        ("grpc.use_local_subchannel_pool", 1),
        # Addresses are given, never looked up through a proxy of the environment.
        ("grpc.enable_http_proxy", 0),
    ]


def _method_name(method: str) -> dict[str, str]:
    service, slash, name = method.strip("/").partition("/")
    if not slash or not name:
        raise ValueError(f"{method!r} is not package.Service/Method")
    return {"service": service, "method": name}


def mesh_metadata(settings: MeshSettings, tenant_id: UUID | str | None = None) -> Metadata:
    """Returns the metadata that proves a process of the mesh, on behalf of a tenant if one is given."""
    token = (MESH_TOKEN_KEY, settings.mesh_token.get_secret_value())
    return (token,) if tenant_id is None else (token, (TENANT_KEY, str(tenant_id)))


def open_channel(
    settings: MeshSettings,
    address: str | None = None,
    *,
    safe: Iterable[str] = (),
    mesh: bool = True,
    unary_timeout: float = UNARY_TIMEOUT,
) -> grpc.aio.Channel:
    """Opens a channel; the caller closes it (`async with`).

    Each call gets the request id, the traceparent, the mesh's token, and the tenant of `current_identity()`
    unless its metadata names one. A unary call ends after `unary_timeout` seconds, or with the RPC being
    served if that ends sooner; a stream has only the deadline its caller gives.

    Args:
        settings: For the mesh's address and token.
        address: host:port; the mesh's inner listener if None.
        safe: Unary read-only methods (`package.Service/Method`) that are tried again when UNAVAILABLE.
        mesh: False for a peer outside of the mesh, which gets neither token nor tenant.
        unary_timeout: Default deadline of unary calls in seconds.
    """
    target = address if address is not None else settings.mesh_address
    channel = grpc.aio.insecure_channel(target, options=channel_options(safe))
    token = settings.mesh_token.get_secret_value() if mesh else None
    return MeshChannel(channel, token, unary_timeout)


def mesh_check(channel: grpc.aio.Channel) -> Callable[[], Awaitable[str | None]]:
    """Returns a readiness check that Envoy, behind a channel to the mesh, can be reached."""

    async def check() -> str | None:
        state = channel.get_state(try_to_connect=True)
        while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=True)
        return None if state is grpc.ChannelConnectivity.READY else "the mesh cannot be reached"

    return check


@asynccontextmanager
async def stream_call(call: C) -> AsyncIterator[C]:
    """Cancels a streaming call when the block ends: one that is only abandoned would run on.

    Example:
        async with stream_call(stub.WatchRun(request)) as call:
            async for event in call:
                ...
    """
    try:
        yield call
    finally:
        call.cancel()


class MeshChannel(grpc.aio.Channel):
    """A grpc.aio channel whose calls carry the mesh's metadata and a deadline."""

    def __init__(self, channel: grpc.aio.Channel, token: str | None, unary_timeout: float) -> None:
        """Wraps `channel`."""
        self._channel = channel
        self._token = token
        self._unary_timeout = unary_timeout

    async def __aenter__(self) -> MeshChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        await self._channel.__aexit__(kind, error, trace)

    async def close(self, grace: float | None = None) -> None:
        """Closes the channel, waiting up to `grace` seconds for calls under way."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Returns the connection's state."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Waits until the connection's state is another one."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Waits until the channel is connected; give it a deadline."""
        await self._channel.channel_ready()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Makes the multicallable of a unary method, with the default deadline."""
        return self._wrap(method, self._channel.unary_unary(method, *args, **kwargs), self._unary_timeout)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Makes the multicallable of a server-streaming method."""
        return self._wrap(method, self._channel.unary_stream(method, *args, **kwargs), None)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Makes the multicallable of a client-streaming method."""
        return self._wrap(method, self._channel.stream_unary(method, *args, **kwargs), None)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Makes the multicallable of a bidirectional method."""
        return self._wrap(method, self._channel.stream_stream(method, *args, **kwargs), None)

    def _wrap(self, method: str, inner: Callable[..., Any], default_timeout: float | None) -> Any:
        def call(
            request: Any = None,
            *,
            timeout: float | None = None,
            metadata: Sequence[tuple[str, str | bytes]] | grpc.aio.Metadata | None = None,
            **kwargs: Any,
        ) -> Any:
            if timeout is None and default_timeout is not None:
                left = remaining()
                timeout = default_timeout if left is None else min(default_timeout, left)
            span = tracing.start_client_span(method)
            arguments = () if request is None else (request,)
            result = inner(*arguments, timeout=timeout, metadata=self._metadata(metadata, span), **kwargs)
            if span.recording:
                span.end_with(result)
            return result

        return call

    def _metadata(
        self, given: Sequence[tuple[str, str | bytes]] | grpc.aio.Metadata | None, span: tracing.ClientSpan
    ) -> Metadata:
        pairs: list[tuple[str, str | bytes]] = list(given or ())
        present = {key for key, _ in pairs}
        if self._token is not None:
            if MESH_TOKEN_KEY not in present:
                pairs.append((MESH_TOKEN_KEY, self._token))
            if TENANT_KEY not in present:
                tenant_id = current_identity().tenant_id
                if tenant_id is not None:
                    pairs.append((TENANT_KEY, str(tenant_id)))
        if REQUEST_ID_KEY not in present:
            request_id = current_request_id()
            if request_id:
                pairs.append((REQUEST_ID_KEY, request_id))
        if tracing.TRACEPARENT_KEY not in present:
            pairs.append((tracing.TRACEPARENT_KEY, span.traceparent))
        return tuple(pairs)
