"""Large results: kept in the object store by their SHA-256, with a beginning for the model."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Protocol
from uuid import UUID

import obstore
import structlog
from obstore.store import ObjectStore

from meshkit.errors import NotFoundError, UnavailableError
from meshkit.objects import CALL_SECONDS, FAILURES, NOT_FOUND, bucket_missing, explain, open_store
from meshkit.tasks import Backoff
from services.tool import metrics
from services.tool.domain import CallRequest, CallState, Outcome

_log = structlog.get_logger("tool.results")

# What the journal and the event log hold themselves; the object store has the rest.
INLINE_BYTES = 64 * 1024
PREVIEW_BYTES = 2 * 1024
# One message of a result that is read.
READ_BYTES = 256 * 1024
# As many as S3 lists, and deletes, at once.
DELETE_OBJECTS = 1000
# Where all results are.
RESULTS = "tool-results"
_PROBE = f"{RESULTS}/probe"


class ResultStore(Protocol):
    """Where large results go."""

    async def put(self, tenant_id: UUID, session_id: UUID, data: bytes) -> str:
        """Stores a session's result and returns its reference, `sha256:<hex>`. May be repeated.

        Raises:
            UnavailableError: It cannot be stored now.
        """
        ...

    async def get(
        self, tenant_id: UUID, session_id: UUID | None, ref: str
    ) -> tuple[int, AsyncIterator[bytes]]:
        """Returns the size of a session's result, and its bytes piece by piece, which raise the same.

        Raises:
            NotFoundError: TOOL_CALL_NOT_FOUND: the session has no such result.
            UnavailableError: It cannot be read now.
        """
        ...

    async def delete(self, tenant_id: UUID, session_id: UUID) -> tuple[int, bool]:
        """Deletes results of a session that is gone; returns how many, and whether there may be others.

        Raises:
            UnavailableError: They cannot be deleted now.
        """
        ...

    async def problem(self) -> str | None:
        """Returns None if the store works as far as is known, else what is wrong."""
        ...


def object_path(tenant_id: UUID, session_id: UUID, ref: str) -> str:
    """Returns where the object of a reference is: below its tenant and session, which are removed whole.

    No session has another one's objects, and none that is gone comes back: what is below it can be deleted
    without a look at what others write just now.
    """
    return f"{_folder(tenant_id, session_id)}/{ref.removeprefix('sha256:')}"


def _folder(tenant_id: UUID, session_id: UUID) -> str:
    return f"{RESULTS}/{tenant_id}/{session_id}"


def paths(tenant_id: UUID, session_id: UUID | None, ref: str) -> list[str]:
    """Returns where the object of a reference may be, the likeliest place first."""
    # Versions that did not keep results by session had them right below the tenant.
    earlier = f"{RESULTS}/{tenant_id}/{ref.removeprefix('sha256:')}"
    return [earlier] if session_id is None else [object_path(tenant_id, session_id, ref), earlier]


class ObjectResults:
    """Results in an object store: a folder, or S3.

    Args:
        store: The store, open.
        url: Where it is.
    """

    def __init__(self, store: ObjectStore, url: str) -> None:
        self._store = store
        self._url = url
        # Until a write has succeeded, and after one that failed, nothing else tells whether one can.
        self._unproven = True

    async def put(self, tenant_id: UUID, session_id: UUID, data: bytes) -> str:
        """Writes the object; writing the same bytes again changes nothing.

        Not only where there is none: the store's client sends a write again whose answer was lost, and would
        then be told of its own object that it is there already.
        """
        ref = f"sha256:{hashlib.sha256(data).hexdigest()}"
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await obstore.put_async(self._store, object_path(tenant_id, session_id, ref), data)
        except FAILURES as error:
            self._unproven = True
            raise self._away(error, "a large result was not stored") from error
        self._unproven = False
        return ref

    async def get(
        self, tenant_id: UUID, session_id: UUID | None, ref: str
    ) -> tuple[int, AsyncIterator[bytes]]:
        """Opens the object."""
        for path in paths(tenant_id, session_id, ref):
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    found = await obstore.get_async(self._store, path)
            except FAILURES as error:
                if isinstance(error, NOT_FOUND) and not bucket_missing(error):
                    continue
                raise self._away(error, "a large result was not read") from error
            return int(found.meta["size"]), self._pieces(aiter(found.stream(min_chunk_size=READ_BYTES)))
        raise NotFoundError("TOOL_CALL_NOT_FOUND", "there is no such result", metadata={"content_ref": ref})

    async def delete(self, tenant_id: UUID, session_id: UUID) -> tuple[int, bool]:
        """Lists one page of objects and deletes them; one that is gone by then is as good as deleted."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                page = await self._page(f"{_folder(tenant_id, session_id)}/")
                if page:
                    await obstore.delete_async(self._store, [found["path"] for found in page])
        except FAILURES as error:
            if not isinstance(error, NOT_FOUND) or bucket_missing(error):
                raise self._away(error, "results of a deleted session were not deleted") from error
            return 0, True
        metrics.DELETED.inc(len(page))
        metrics.DELETED_BYTES.inc(sum(found["size"] for found in page))
        return len(page), len(page) == DELETE_OBJECTS

    async def _page(self, prefix: str) -> Sequence[Any]:
        # Not by anext with a default: of an empty listing that is a SystemError.
        async for page in obstore.list(self._store, prefix, chunk_size=DELETE_OBJECTS):
            return page
        return ()

    async def problem(self) -> str | None:
        """Writes a small object until that has worked, and reads it from then on.

        A full or read-only store, or one whose keys may not write, still answers reads, and only writes are
        of use here.
        """
        try:
            if self._unproven:
                await obstore.put_async(self._store, _PROBE, b"")
                self._unproven = False
            else:
                await obstore.get_async(self._store, _PROBE)
        except FAILURES as error:
            if isinstance(error, NOT_FOUND) and not bucket_missing(error):
                # Somebody cleaned up; the next look writes it again.
                self._unproven = True
                return None
            return f"{explain(error, self._url)}; large results wait"
        return None

    async def _pieces(self, chunks: AsyncIterator[Any]) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    chunk = bytes(await anext(chunks))
            except StopAsyncIteration:
                return
            except FAILURES as error:
                raise self._away(error, "a large result was not read to its end") from error
            # A store may hand out more at once than one message takes.
            for at in range(0, len(chunk), READ_BYTES):
                yield chunk[at : at + READ_BYTES]

    def _away(self, error: BaseException, what: str) -> UnavailableError:
        """Logs why the store failed, and returns what is said to others, who are told nothing of it."""
        _log.warning(what, reason=explain(error, self._url))
        return UnavailableError(
            "SERVICE_UNAVAILABLE", "the object store does not answer", retry_after_ms=1_000
        )


def open_results(url: str) -> ResultStore | None:
    """Opens the object store; None without a URL.

    Args:
        url: As `meshkit.objects.open_store`.

    Raises:
        StartupError: The URL is not usable.
    """
    return ObjectResults(open_store(url), url) if url else None


async def shrink(
    store: ResultStore | None, request: CallRequest, outcome: Outcome, seconds: float
) -> Outcome:
    """Returns an outcome that the journal can hold: a large result goes to the object store, or is cut.

    Args:
        store: The object store; None cuts.
        request: The call whose result it is.
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
            ref = await store.put(request.tenant_id, request.session_id, data)
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
