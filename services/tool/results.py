"""Large results: kept in the object store by their SHA-256, with a beginning for the model."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol
from uuid import UUID

import obstore
import structlog
from obstore.exceptions import BaseError
from obstore.exceptions import NotFoundError as ObjectNotFoundError
from obstore.store import ObjectStore, from_url

from meshkit.errors import NotFoundError, StartupError, UnavailableError
from meshkit.tasks import Backoff
from services.tool import metrics
from services.tool.domain import CallState, Outcome

_log = structlog.get_logger("tool.results")

# What the journal and the event log hold themselves; the object store has the rest.
INLINE_BYTES = 64 * 1024
PREVIEW_BYTES = 2 * 1024
# One message of a result that is read.
READ_BYTES = 256 * 1024
_PUT_SECONDS = 20.0
_PROBE = "tool-results/probe"
_GET_SECONDS = 20.0


class ResultStore(Protocol):
    """Where large results go."""

    async def put(self, tenant_id: UUID, data: bytes) -> str:
        """Stores a result and returns its reference, `sha256:<hex>`. May be repeated.

        Raises:
            UnavailableError: It cannot be stored now.
        """
        ...

    async def get(self, tenant_id: UUID, ref: str) -> tuple[int, AsyncIterator[bytes]]:
        """Returns the size of a tenant's result, and its bytes piece by piece, which raise the same.

        Raises:
            NotFoundError: TOOL_CALL_NOT_FOUND: the tenant has no such result.
            UnavailableError: It cannot be read now.
        """
        ...

    async def problem(self) -> str | None:
        """Returns None if the store works as far as is known, else what is wrong."""
        ...


def object_path(tenant_id: UUID, ref: str) -> str:
    """Returns where the object of a reference is: below its tenant, so that a tenant can be removed whole."""
    return f"tool-results/{tenant_id}/{ref.removeprefix('sha256:')}"


class ObjectResults:
    """Results in an object store: a folder, or S3."""

    def __init__(self, store: ObjectStore) -> None:
        """Uses a store of `open_results`."""
        self._store = store
        self._failing = False

    async def put(self, tenant_id: UUID, data: bytes) -> str:
        """Writes the object; writing the same bytes again changes nothing."""
        ref = f"sha256:{hashlib.sha256(data).hexdigest()}"
        try:
            async with asyncio.timeout(_PUT_SECONDS):
                await obstore.put_async(self._store, object_path(tenant_id, ref), data)
        except (BaseError, OSError, TimeoutError) as error:
            self._failing = True
            _log.warning("a large result was not stored", error=type(error).__name__, bytes=len(data))
            raise _away() from error
        self._failing = False
        return ref

    async def get(self, tenant_id: UUID, ref: str) -> tuple[int, AsyncIterator[bytes]]:
        """Opens the object."""
        try:
            async with asyncio.timeout(_GET_SECONDS):
                found = await obstore.get_async(self._store, object_path(tenant_id, ref))
        except (ObjectNotFoundError, FileNotFoundError) as error:
            raise NotFoundError(
                "TOOL_CALL_NOT_FOUND", "there is no such result", metadata={"content_ref": ref}
            ) from error
        except (BaseError, OSError, TimeoutError) as error:
            _log.warning("a large result was not read", error=type(error).__name__)
            raise _away() from error
        return int(found.meta["size"]), _pieces(aiter(found.stream(min_chunk_size=READ_BYTES)))

    async def problem(self) -> str | None:
        """Asks for an object that is not there; after a write that failed, writes a small one.

        A full or read-only store still answers reads, and only writes are of use here.
        """
        try:
            if self._failing:
                await obstore.put_async(self._store, _PROBE, b"")
                self._failing = False
            else:
                await obstore.head_async(self._store, _PROBE)
        except (ObjectNotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError):
            return "the object store does not answer; large results wait"
        return None


async def _pieces(chunks: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(_GET_SECONDS):
                chunk = bytes(await anext(chunks))
        except StopAsyncIteration:
            return
        except (BaseError, OSError, TimeoutError) as error:
            _log.warning("a large result was not read to its end", error=type(error).__name__)
            raise _away() from error
        # A store may hand out more at once than one message takes.
        for at in range(0, len(chunk), READ_BYTES):
            yield chunk[at : at + READ_BYTES]


def _away() -> UnavailableError:
    return UnavailableError("SERVICE_UNAVAILABLE", "the object store does not answer", retry_after_ms=1_000)


def open_results(url: str) -> ResultStore | None:
    """Opens the object store; None without a URL.

    Args:
        url: `file:///folder` (made if it is not there) or `s3://bucket/prefix`; credentials of S3 come from
            the usual AWS_* variables.

    Raises:
        StartupError: The URL is not usable.
    """
    if not url:
        return None
    try:
        if url.startswith("file:"):
            return ObjectResults(from_url(url, mkdir=True))
        return ObjectResults(
            from_url(
                url,
                client_options={"timeout": timedelta(seconds=10), "connect_timeout": timedelta(seconds=3)},
                retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=_PUT_SECONDS)},
            )
        )
    except (BaseError, OSError, ValueError, TypeError) as error:
        # The store's own text may repeat the URL with what is secret in it.
        raise StartupError(
            f"the object store cannot be used ({type(error).__name__}); HERMESH_OBJECT_STORE_URL must be "
            "file:///folder or s3://bucket/prefix"
        ) from error


async def shrink(store: ResultStore | None, tenant_id: UUID, outcome: Outcome, seconds: float) -> Outcome:
    """Returns an outcome that the journal can hold: a large result goes to the object store, or is cut.

    Args:
        store: The object store; None cuts.
        tenant_id: Whose result it is.
        outcome: What the tool returned.
        seconds: How long it is tried again while the store is away.
    """
    data = outcome.content.encode("utf-8")
    if len(data) <= INLINE_BYTES:
        return outcome
    if outcome.state is not CallState.COMPLETED:
        return cut_outcome(outcome, data, "error", "an error's text is not stored")
    if store is None:
        return cut_outcome(outcome, data, "no_store", "there is no object store")
    end = time.monotonic() + seconds
    backoff = Backoff(0.2, 5.0)
    while True:
        try:
            ref = await store.put(tenant_id, data)
        except UnavailableError:
            left = end - time.monotonic()
            if left <= 0:
                why = f"the object store did not take it for {seconds:g} s"
                return cut_outcome(outcome, data, "store_down", why)
            await asyncio.sleep(min(backoff.next(), left))
        else:
            return replace(outcome, content=preview(data), content_ref=ref)


def cut_outcome(outcome: Outcome, data: bytes, reason: str, why: str) -> Outcome:
    """Returns the outcome with what the journal itself can hold of its text.

    Args:
        outcome: What the tool returned.
        data: Its text, encoded.
        reason: A word for the metric.
        why: For whoever reads the text.
    """
    metrics.CUT.labels(reason).inc()
    return replace(outcome, content=cut(data, why))


def clean(text: str) -> str:
    """Returns a text that UTF-8 and PostgreSQL can hold: without U+0000 and lone surrogates."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def beginning(data: bytes, size: int) -> str:
    """Returns the first `size` bytes of UTF-8 as text, not cut inside a character."""
    return data[:size].decode("utf-8", "ignore")


def preview(data: bytes) -> str:
    """Returns what a model sees of a stored result."""
    return f"{beginning(data, PREVIEW_BYTES)}\n[the beginning of {len(data)} bytes; all of it is stored]"


def cut(data: bytes, why: str) -> str:
    """Returns what is left of a large text that is not stored, with the reason: the rest is lost."""
    note = f"\n[cut: the beginning of {len(data)} bytes; the rest is lost, because {why}]"
    return beginning(data, INLINE_BYTES - len(note)) + note
