"""Large results of a restored database: from the backup, or from the object store of the mesh that was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import ObjectStore

from launcher.backup.archive import Archive, Ref
from launcher.backup.restore import check_objects, put, whole
from launcher.backup.take import in_parallel, read_object, without_credentials
from launcher.errors import LaunchError
from meshkit.errors import StartupError
from meshkit.objects import CALL_SECONDS, FAILURES, NOT_FOUND, bucket_missing, explain, open_store
from services.tool.results import object_path, paths

_COPIES = 4


class Results:
    """Where large results may be, and where they have to be.

    Args:
        archive: The backup.
        former_url: The object store of the mesh that was.
        url: That of the new one; may be the same.
    """

    def __init__(self, archive: Archive, former_url: str, url: str) -> None:
        self._archive = archive
        self._url = url
        self._store = open_store(url)
        self._same = without_credentials(url) == former_url
        self._former_url = former_url
        self._former = None if self._same else _opened(former_url)

    async def bring(self, listed: Callable[[], Iterator[Ref]]) -> tuple[int, int, list[str]]:
        """Has every listed result be there.

        Args:
            listed: Lists those that the database refers to, each once.

        Returns:
            How many are there, the bytes of those that were copied, and the paths of those that are nowhere.

        Raises:
            LaunchError: The store has other results, or cannot be used.
        """
        if not self._same:
            ours = {object_path(ref.tenant_id, ref.session_id, ref.ref) for ref in listed()}
            await check_objects(self._store, self._url, ours)
        number, size, missing = 0, 0, list[str]()

        async def work(refs: Iterator[Ref]) -> None:
            nonlocal number, size
            for ref in refs:
                copied = await self._bring(ref)
                if copied is None:
                    missing.append(object_path(ref.tenant_id, ref.session_id, ref.ref))
                    continue
                number += 1
                size += copied

        refs = listed()
        await in_parallel([work(refs) for _ in range(_COPIES)])
        return number, size, sorted(missing)

    async def _bring(self, ref: Ref) -> int | None:
        """Returns how many bytes had to be copied; None where the result is nowhere."""
        if self._same and await self._there(ref):
            return 0
        path = object_path(ref.tenant_id, ref.session_id, ref.ref)
        kept = self._archive.objects / path
        if kept.exists():
            data: bytes | None = await asyncio.to_thread(whole, kept, ref)
        else:
            data = await self._of_former(ref)
        if data is None:
            return None
        await put(self._store, self._url, path, data)
        return len(data)

    async def _there(self, ref: Ref) -> bool:
        for path in paths(ref.tenant_id, ref.session_id, ref.ref):
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    await obstore.head_async(self._store, path)
                return True
            except FAILURES as error:
                if not isinstance(error, NOT_FOUND) or bucket_missing(error):
                    raise LaunchError(
                        f"a large result cannot be looked for: {explain(error, self._url)}"
                    ) from error
        return False

    async def _of_former(self, ref: Ref) -> bytes | None:
        if self._former is None:
            return None
        try:
            return await read_object(self._former, self._former_url, ref)
        except LaunchError:
            # It may be gone for good: what is only there is told as missing, and the rest goes on.
            return None


def _opened(url: str) -> ObjectStore | None:
    # A folder that is not there would be made.
    if not url or (url.startswith("file:") and not Path(unquote(urlsplit(url).path)).is_dir()):
        return None
    try:
        return open_store(url)
    except StartupError:
        return None
