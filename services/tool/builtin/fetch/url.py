"""URLs as `fetch_page` takes them: one parser, whose parts are what is connected to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from services.tool.registry import ToolError

MAX_URL = 2_048
_PORTS = {"http": 80, "https": 443}
# Spaces, control characters and backslashes are where parsers differ; no honest URL has them.
_SUSPECT = re.compile(r"[\x00-\x20\x7f\\]")
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?\.?")
_SAFE = "/:@!$&'()*+,;=-._~%[]"


@dataclass(frozen=True, slots=True)
class Place:
    """A URL in the parts that a request needs.

    Attributes:
        scheme: `http` or `https`.
        host: ASCII, lower case; an IPv6 address without brackets.
        port: The port.
        target: Path and query, ASCII.
    """

    scheme: str
    host: str
    port: int
    target: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"

    @property
    def host_header(self) -> str:
        """The value of `Host`."""
        return str(self)[len(self.scheme) + 3 : len(str(self)) - len(self.target)]


def parse_url(text: str) -> Place:
    """Reads an http(s) URL.

    Raises:
        ToolError: It is not one that may be fetched; the message says why.
    """
    text = text.strip()
    if len(text) > MAX_URL:
        raise _bad(f"the URL is longer than {MAX_URL} characters")
    if _SUSPECT.search(text):
        raise _bad("the URL has characters that must be escaped")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise _bad("the URL is not valid") from error
    if parts.scheme not in _PORTS:
        raise _bad("the URL must begin with http:// or https://")
    if "@" in parts.netloc:
        raise _bad("a URL with a user name or password is not fetched")
    if "[" in parts.netloc and ":" not in host:
        raise _bad("the URL's host is not valid")
    if port == 0:
        raise _bad("the URL's port is not valid")
    target = quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        target += "?" + quote(parts.query, safe=_SAFE + "?")
    return Place(parts.scheme, _host(host), port if port is not None else _PORTS[parts.scheme], target)


def join(base: Place, location: str) -> Place:
    """Returns where a redirect leads.

    Raises:
        ToolError: As `parse_url`.
    """
    return parse_url(urljoin(str(base), location.strip()))


def _host(host: str) -> str:
    if ":" in host:
        # In brackets, so an IPv6 literal; whether it is one is for the resolver to say.
        if not re.fullmatch(r"[0-9a-f:.]+", host):
            raise _bad("the URL's host is not valid")
        return host
    try:
        name = host.encode("ascii").decode() if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise _bad("the URL's host is not valid") from error
    name = name.lower()
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise _bad("the URL's host is not valid" if name else "the URL has no host")
    return name


def _bad(message: str) -> ToolError:
    return ToolError(message, reason="TOOL_ARGUMENTS_INVALID")
