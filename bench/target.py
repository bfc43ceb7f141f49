"""What the load generator needs to know of a server: how to ask it, and how to read its answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Ask:
    """One streamed request, by POST.

    Attributes:
        url: where to.
        body: the JSON body, or a form's fields.
        headers: beside Content-Type.
        form: whether the body goes as a form.
    """

    url: str
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    form: bool = False


class IncompleteReply(Exception):
    """A reply ended without its end, or lacks tokens; the message has its last bytes."""


class Target(Protocol):
    """A server under load.

    Attributes:
        name: how tables name it.
        durable: whether a reply's events are in a database before the client sees them.
        first_token: matches in the body's bytes once the first token of text is in them.
    """

    name: str
    durable: bool
    first_token: re.Pattern[bytes]

    def processes(self) -> Mapping[str, int]:
        """Returns the pid of each of its processes by name; a pid's descendants count with it."""
        ...

    async def prepare(self, prompt: str) -> Ask:
        """Does, unmeasured, what a conversation needs before its first question; returns the question."""
        ...

    def text(self, body: bytes) -> str:
        """Returns the whole text of a reply, read after it was measured.

        Raises:
            IncompleteReply: It lacks its end.
        """
        ...


@runtime_checkable
class Replayed(Protocol):
    """A target that keeps its replies, and so can be asked whether what was streamed is what it kept."""

    async def check_kept(self, body: bytes) -> None:
        """Reads a reply again from where it is kept and compares it with the body that was streamed.

        Raises:
            IncompleteReply: They differ.
        """
        ...


@runtime_checkable
class Recalling(Protocol):
    """A target that reads long-term memory before it answers, and says what it found."""

    def recalled(self, body: bytes) -> int:
        """Returns how many memories a reply's run got."""
        ...
