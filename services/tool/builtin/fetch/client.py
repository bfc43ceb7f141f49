"""One bounded GET: each hop resolved, checked and connected to the very address that was checked."""

from __future__ import annotations

import asyncio
import socket
import ssl
import zlib
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import httpcore
import httpx

from services.tool.builtin.fetch.address import Allowed, is_public, parse_ip
from services.tool.builtin.fetch.url import Place, join, parse_url
from services.tool.registry import ToolError

MAX_BYTES = 1024 * 1024
MAX_REDIRECTS = 5
CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 20.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TYPES = frozenset({"text/html", "application/xhtml+xml", "application/json"})
_MAX_ADDRESSES = 4
_MAX_PACKED = 2 * MAX_BYTES
_GZIP = b"\x1f\x8b"
_HEADER = len(_GZIP)

Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class Page:
    """What came back.

    Attributes:
        url: The address after the redirects.
        content_type: Without parameters, lower case.
        charset: As the server named it, or empty.
        body: At most `MAX_BYTES`.
        cut: Whether there was more.
        incomplete: Whether the server's packed bytes ended too early.
    """

    url: str
    content_type: str
    charset: str
    body: bytes
    cut: bool = False
    incomplete: bool = False


@dataclass(frozen=True, slots=True)
class Body:
    """A body, unpacked; the members are those of `Page`."""

    data: bytes
    cut: bool = False
    incomplete: bool = False


async def resolve(host: str, port: int) -> list[str]:
    """Returns a name's addresses by the system's resolver, in its order."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def refused() -> ToolError:
    """Returns the error for a place that is not public. It does not say what the name resolved to."""
    return ToolError("this address is private or otherwise not to be fetched", reason="ADDRESS_REFUSED")


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects httpcore to checked addresses only.

    The check sits where the socket is opened, so there is no way to a connection around it, and no second
    look-up between the check and the use.
    """

    def __init__(self, allowed: Allowed, resolve: Resolve) -> None:
        """Takes the exceptions, and how names are resolved."""
        self._allowed = allowed
        self._resolve = resolve
        self._inner: httpcore.AsyncNetworkBackend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolves, checks, connects.

        Raises:
            ToolError: The name does not exist, or one of its addresses is not public. One is enough: a name
                that mixes public and private addresses is an attack or a mistake.
        """
        try:
            addresses = (await self._resolve(host, port))[:_MAX_ADDRESSES]
        except (OSError, UnicodeError) as error:
            raise ToolError(f"the host {host} cannot be found") from error
        if not addresses:
            raise ToolError(f"the host {host} cannot be found")
        if (host, port) not in self._allowed and not all(is_public(parse_ip(text)) for text in addresses):
            raise refused()
        failure: Exception | None = None
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore.ConnectError("no address")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Refuses: nothing is fetched from a socket file."""
        raise refused()

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


class Fetcher:
    """Fetches pages. It keeps no cookies and no connections, and reads no proxy from the environment."""

    def __init__(
        self,
        allowed: Allowed,
        *,
        resolve: Resolve = resolve,
        user_agent: str = "hermesh-fetch/1",
        tls: ssl.SSLContext | None = None,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        """Takes the exceptions from the rule about addresses; the rest is for tests."""
        self._backend = GuardedBackend(allowed, resolve)
        self._user_agent = user_agent
        self._tls = tls if tls is not None else httpx.create_ssl_context()
        self._total_seconds = total_seconds

    async def get(self, url: str, progress: Callable[[str], None]) -> Page:
        """Fetches a page, following up to five redirects.

        Raises:
            ToolError: The URL is not allowed, the server does not answer as it should, or it took too long.
        """
        place = parse_url(url)
        try:
            async with asyncio.timeout(self._total_seconds):
                for _ in range(MAX_REDIRECTS + 1):
                    progress(f"GET {place}")
                    answer = await self._hop(place)
                    if isinstance(answer, Page):
                        return answer
                    place = answer
        except TimeoutError as error:
            raise ToolError(f"the page did not arrive within {self._total_seconds:g} seconds") from error
        raise ToolError(f"the page redirects more than {MAX_REDIRECTS} times")

    async def _hop(self, place: Place) -> Page | Place:
        timeouts = {"connect": CONNECT_SECONDS, "read": self._total_seconds, "write": CONNECT_SECONDS}
        headers = [
            ("Host", place.host_header),
            ("User-Agent", self._user_agent),
            ("Accept", "text/html, application/json;q=0.9, text/*;q=0.8"),
            ("Accept-Encoding", "gzip, deflate"),
            ("Connection", "close"),
        ]
        url = httpcore.URL(
            scheme=place.scheme, host=place.host, port=place.port, target=place.target.encode("ascii")
        )
        try:
            async with httpcore.AsyncConnectionPool(
                ssl_context=self._tls, network_backend=self._backend, max_connections=1, retries=0
            ) as pool:
                async with pool.stream(
                    "GET", url, headers=headers, extensions={"timeout": timeouts}
                ) as response:
                    return await _read(place, response)
        except httpcore.TimeoutException as error:
            raise ToolError(f"{place.host} does not answer in time") from error
        except (httpcore.NetworkError, ssl.SSLError) as error:
            kind = "securely " if "certificate" in str(error).lower() else ""
            raise ToolError(f"{place.host} cannot be reached {kind}".rstrip()) from error
        except (httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
            raise ToolError(f"{place.host} does not answer in HTTP") from error


async def _read(place: Place, response: httpcore.Response) -> Page | Place:
    headers = {key.decode("latin-1").lower(): _header(value) for key, value in response.headers}
    if response.status in _REDIRECTS and headers.get("location"):
        return join(place, headers["location"])
    if not 200 <= response.status < 300:
        raise ToolError(f"the server answered with HTTP status {response.status}")
    content_type, charset = _content_type(headers.get("content-type", ""))
    if content_type not in _TYPES and not content_type.startswith("text/"):
        shown = content_type[:80] or "without a content type"
        raise ToolError(f"the page is {shown}; only text, HTML and JSON are read")
    body = await read_body(response.aiter_stream(), headers.get("content-encoding", ""))
    return Page(str(place), content_type, charset, body.data, body.cut, body.incomplete)


def _header(value: bytes) -> str:
    # Servers write the path of a Location as they have it, mostly in UTF-8; what is none cannot be mistaken
    # for it.
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _content_type(header: str) -> tuple[str, str]:
    kind, _, rest = header.partition(";")
    charset = ""
    for parameter in rest.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip("\"'").lower()
    kind = kind.strip().lower()
    # JSON has many names: application/ld+json, application/problem+json.
    return ("application/json" if kind.endswith("+json") else kind), charset


async def read_body(chunks: AsyncIterable[bytes], encoding: str) -> Body:
    """Reads at most `MAX_BYTES` after unpacking, so that a small packed body cannot grow without bound.

    Raises:
        ToolError: The encoding is not known, or the bytes do not have it.
    """
    encoding = encoding.strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise ToolError("the page is packed in a way that is not read")
    unpack = None if encoding in ("", "identity") else Unpacker()
    body = bytearray()
    packed = 0
    try:
        async for chunk in chunks:
            packed += len(chunk)
            room = MAX_BYTES + 1 - len(body)
            body += chunk[:room] if unpack is None else unpack.feed(chunk, room)
            # A body that is larger packed than not is made to keep us busy.
            if len(body) > MAX_BYTES or packed > _MAX_PACKED:
                return Body(bytes(body[:MAX_BYTES]), cut=True)
    except zlib.error as error:
        raise ToolError("the page cannot be unpacked") from error
    return Body(bytes(body), incomplete=unpack is not None and unpack.incomplete)


class Unpacker:
    """Unpacks gzip, of as many members as there are, and deflate, with zlib's header or, as many send it,
    without.
    """

    def __init__(self) -> None:
        """Begins before the first byte."""
        self._member: Any = None
        self._waiting = b""
        self._done = False

    @property
    def incomplete(self) -> bool:
        """Whether the packed bytes ended before what they pack did."""
        return not self._done and (self._member is not None or bool(self._waiting))

    def feed(self, data: bytes, room: int) -> bytes:
        """Returns what the next bytes unpack to, at most `room` bytes.

        Raises:
            zlib.error: They are not what they ought to be.
        """
        data, self._waiting = self._waiting + data, b""
        out = bytearray()
        while data and len(out) < room:
            if self._member is None:
                if len(data) < _HEADER:
                    self._waiting = data
                    break
                if self._done and data[:_HEADER] != _GZIP:
                    # Padding behind the last member: everybody who unpacks ignores it.
                    break
                self._member, self._done = zlib.decompressobj(wbits=_wbits(data)), False
            out += self._member.decompress(data, room - len(out))
            data = b""
            if self._member.eof:
                data, self._member, self._done = self._member.unused_data, None, True
        return bytes(out)


def _wbits(data: bytes) -> int:
    if data[:_HEADER] == _GZIP:
        return zlib.MAX_WBITS | 16
    zlib_header = data[0] & 0x0F == 8 and int.from_bytes(data[:_HEADER]) % 31 == 0
    return zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS
