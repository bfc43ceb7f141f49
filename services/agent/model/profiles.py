"""What model servers want to be sent, by profile: profiles.toml has the built-in ones, with sources.

A server is known by its host, by who it says owns its models, or by headers of its answers. One that is not
known gets `TOLERANT`: what most take, and what it sent is sent back to it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

AUTO = "auto"
# What a server may want to have back with a message that calls tools, and with each of its calls.
MESSAGE_FIELDS = ("reasoning_content", "reasoning", "reasoning_details")
CALL_FIELDS = ("extra_content",)

_BUILT_IN = Path(__file__).with_name("profiles.toml")


@dataclass(frozen=True, slots=True)
class Quirk:
    """One line of a profile: what differs, and the public page that says so."""

    id: str
    what: str
    source: str
    set: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Profile:
    """How requests to one kind of server are made.

    Attributes:
        name: the profile's name.
        limit: the field that bounds a reply's tokens.
        seed: the field of the seed.
        stream_options: whether usage is asked for with `stream_options`.
        auth: how the API key is sent.
        call_ids: "own" = the model's own ids go back; "nine" = only such that are nine of a-zA-Z0-9; "kimi" =
            only `functions.NAME:NUMBER`. Ids that are made here fit.
        alternate: never two messages of one role in a row, system messages first and as one, and a message of
            the assistant between a tool's result and the user.
        prefill: how a last assistant message is continued: "bare" as it is, "flags" of the request, or a
            field of the message, "prefix" or "partial".
        message_fields: fields that go back with messages that call tools, where the model sent them.
        always: those of them that such a message must have, even if the model sent none.
        call_fields: fields that go back with the calls themselves.
        quirks: what the profile was made of.
    """

    name: str
    title: str = ""
    limit: str = "max_tokens"
    seed: str = "seed"
    stream_options: bool = True
    auth: Literal["bearer", "api-key"] = "bearer"
    call_ids: Literal["own", "nine", "kimi"] = "own"
    alternate: bool = True
    prefill: Literal["bare", "flags", "prefix", "partial"] = "bare"
    message_fields: tuple[str, ...] = MESSAGE_FIELDS
    always: tuple[str, ...] = ()
    call_fields: tuple[str, ...] = CALL_FIELDS
    hosts: tuple[str, ...] = ()
    owned_by: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    quirks: tuple[Quirk, ...] = ()


TOLERANT = Profile("unknown", "any other")

_SETTABLE = {one.name for one in fields(Profile)} - {
    *("name", "title", "quirks", "hosts", "owned_by", "headers", "servers")
}


class ProfileError(ValueError):
    """A file of profiles is not one."""


def read_profiles(path: Path) -> dict[str, Profile]:
    """Read a file of profiles, by name.

    Raises:
        ProfileError: it cannot be read, or says what no profile has.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{path} cannot be read: {error}") from error
    return {name: _profile(name, table, path) for name, table in data.items()}


def _profile(name: str, table: object, path: Path) -> Profile:
    if not isinstance(table, dict):
        raise ProfileError(f"{path}: {name} is not a table")
    profile = Profile(name, str(table.get("title") or name))
    quirks: list[Quirk] = []
    try:
        for one in table.get("quirks", ()):
            quirk = Quirk(one["id"], one["what"], one["source"], one.get("set", {}))
            quirks.append(quirk)
            unknown = set(quirk.set) - _SETTABLE
            if unknown:
                raise ProfileError(f"{path}: {name} sets {', '.join(sorted(unknown))}, which no profile has")
            profile = replace(profile, **{key: _frozen(value) for key, value in quirk.set.items()})
        detect = {key: _frozen(value) for key, value in table.get("detect", {}).items()}
        return replace(profile, quirks=tuple(quirks), **detect)
    except (KeyError, TypeError, AttributeError) as error:
        raise ProfileError(f"{path}: {name} is not a profile: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@cache
def built_in() -> Mapping[str, Profile]:
    """Return the built-in profiles by name."""
    return read_profiles(_BUILT_IN)


class Profiles:
    """The profiles that may be used, and how each backend's is found.

    Args:
        file: a file of further profiles, or of others under the same names; None for none.

    Raises:
        ProfileError: the file is not one.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._known = dict(built_in()) | (read_profiles(file) if file is not None else {})

    @property
    def names(self) -> Collection[str]:
        """The names that may be asked for."""
        return self._known

    def chosen(self, names: Sequence[str], place: int) -> Profile | None:
        """Return the profile that a setting names for a backend, None when it is to be found out.

        Args:
            names: one for each backend in order, or one for all.
            place: which backend.

        Raises:
            ProfileError: there is no such profile, or there are not as many names as backends.
        """
        if not names:
            return None
        if len(names) > 1 and place >= len(names):
            raise ProfileError("HERMESH_LLM_PROFILE names one profile, or one for each URL")
        name = names[place] if len(names) > 1 else names[0]
        if name == AUTO:
            return None
        if name == TOLERANT.name:
            return TOLERANT
        if name not in self._known:
            raise ProfileError(f"there is no model profile {name!r}; there are: {', '.join(self._known)}")
        return self._known[name]

    def by_host(self, host: str) -> Profile | None:
        """Return the profile of a server with this host name."""
        for profile in self._known.values():
            for suffix in profile.hosts:
                if host == suffix or host.endswith(suffix if suffix.startswith(".") else f".{suffix}"):
                    return profile
        return None

    def by_answer(self, headers: Mapping[str, str], owners: Collection[str] = ()) -> Profile | None:
        """Return the profile of a server that answered so.

        Args:
            headers: of its answer, names in lower case.
            owners: who owns its models, as its list of them says.
        """
        server = headers.get("server", "").lower()
        for profile in self._known.values():
            if any(name in headers for name in profile.headers) or server in profile.servers:
                return profile
        # All of them: a proxy in front of several servers lists the models of each.
        if not owners:
            return None
        return next((one for one in self._known.values() if set(owners) <= set(one.owned_by)), None)
