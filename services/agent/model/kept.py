"""What a server sent beside a reply and may want to have back with it: reasoning, signatures."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import orjson

from services.agent.model.port import Kept
from services.agent.model.torn import whole

# Bytes of it that are stored with one message: text is cut there, what cannot be cut is left out.
MAX_KEPT = 256 * 1024


class KeptFields:
    """Collects the fields of a reply's deltas that go back with the message.

    Args:
        names: which.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._texts: dict[str, list[str]] = {name: [] for name in names}
        self._entries: dict[str, list[Any]] = {}
        self._size = 0

    def text(self, name: str, text: str) -> None:
        """Keep a piece of a field that is text."""
        texts = self._texts.get(name)
        if texts is not None and self._size <= MAX_KEPT:
            self._size += len(text)
            texts.append(text)

    def entries(self, name: str, entries: object) -> None:
        """Keep entries of a field that is a list."""
        if name not in self._texts or not isinstance(entries, list) or self._size > MAX_KEPT:
            return
        try:
            self._size += len(orjson.dumps(entries))
        except TypeError:  # nothing that could be stored
            self._size = MAX_KEPT + 1
        self._add(self._entries.setdefault(name, []), entries)

    @staticmethod
    def _add(entries: list[Any], new: list[Any]) -> None:
        """Add entries; the pieces of one (same type and index, text in a row) become one again."""
        for entry in new:
            last = entries[-1] if entries else None
            if (
                isinstance(entry, dict)
                and isinstance(last, dict)
                and isinstance(entry.get("text"), str)
                and isinstance(last.get("text"), str)
                and (entry.get("type"), entry.get("index")) == (last.get("type"), last.get("index"))
                and not last.get("signature")
            ):
                more = {key: value for key, value in entry.items() if value is not None}
                entries[-1] = {**last, **more, "text": last["text"] + entry["text"]}
            else:
                entries.append(entry)

    def event(self) -> Kept | None:
        """Return what was collected, None for nothing."""
        fields: dict[str, Any] = {
            name: whole("".join(texts)).replace("\x00", "")[:MAX_KEPT]
            for name, texts in self._texts.items()
            if texts
        }
        if self._size <= MAX_KEPT:
            fields |= self._entries
        return Kept(fields) if fields else None
