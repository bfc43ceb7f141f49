"""`fetch_page` against a real server on loopback."""

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from services.tool.builtin.fetch import make_fetch_page
from services.tool.builtin.fetch.address import Allowed
from services.tool.builtin.fetch.client import MAX_BYTES, Fetcher, resolve
from services.tool.registry import ToolContext, ToolError
from tests.integration.tool.web import TLS, Web, redirect, response


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with Web() as web:
        yield web


@pytest.fixture
async def inner() -> AsyncIterator[Web]:
    """A server that may not be fetched."""
    async with Web() as inner:
        inner.answers["/"] = response(b"secret")
        yield inner


def fetcher(*places: str, **more: object) -> Fetcher:
    return Fetcher(Allowed(places), **more)  # type: ignore[arg-type]


async def get(fetcher: Fetcher, url: str) -> str:
    page = await fetcher.get(url, lambda text: None)
    return page.body.decode()


async def reason(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(ToolError) as caught:
        await get(fetcher, url)
    assert len(caught.value.message) < 300
    return caught.value.reason


async def test_a_page_comes_back_as_readable_text(web: Web) -> None:
    web.answers["/page?q=1"] = response("<title>Hé</title><p>Hello".encode(), "text/html; charset=utf-8")
    progress: list[str] = []
    ids = UUID(int=1)
    context = ToolContext("c", "k", ids, ids, ids, progress=progress.append)
    tool = make_fetch_page(fetcher(web.place))
    text = await tool.function(tool.parse(f'{{"url": "{web.url("/page?q=1#part")}"}}'), context)
    assert text == f"URL: {web.url('/page?q=1')}\nTitle: Hé\n\nHello"
    assert progress == [f"GET {web.url('/page?q=1')}"]


async def test_the_request_gives_nothing_away(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    web.answers["/"] = response(b"ok", "text/html", "200 OK", "Set-Cookie: a=b")
    web.answers["/again"] = redirect("/")
    assert await get(fetcher(web.place), web.url("/again")) == "ok"
    for head in web.requests:
        names = {line.partition(":")[0].lower() for line in head.split("\r\n")[1:] if line}
        assert names == {"host", "user-agent", "accept", "accept-encoding", "connection"}
        assert f"Host: {web.place}" in head


async def test_loopback_is_refused_without_a_connection(inner: Web) -> None:
    for host in (
        "127.0.0.1",
        "localhost",
        "[::ffff:127.0.0.1]",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",
    ):
        assert await reason(fetcher(), f"http://{host}:{inner.port}/") == "ADDRESS_REFUSED"
    assert inner.connections == 0


async def test_an_exception_is_for_its_port_only(web: Web, inner: Web) -> None:
    assert await reason(fetcher(web.place), inner.url()) == "ADDRESS_REFUSED"
    assert inner.connections == 0


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
async def test_a_redirect_into_the_private_network_is_refused(web: Web, inner: Web, status: str) -> None:
    web.answers["/"] = redirect(inner.url(), status)
    assert await reason(fetcher(web.place), web.url()) == "ADDRESS_REFUSED"
    assert inner.connections == 0


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://a:b@127.0.0.1/", "gopher://127.0.0.1/"])
async def test_a_redirect_to_what_is_no_page_is_refused(web: Web, location: str) -> None:
    web.answers["/"] = redirect(location)
    assert await reason(fetcher(web.place), web.url()) == "TOOL_ARGUMENTS_INVALID"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
async def test_a_redirect_to_a_path_that_is_not_ascii_is_followed(web: Web, encoding: str) -> None:
    web.answers["/"] = redirect(f"{web.url()}caf\u00e9?\u00fc").decode().encode(encoding)
    web.answers["/caf%C3%A9?%C3%BC"] = response("gef\u00fcllt".encode(), "text/plain")
    assert await get(fetcher(web.place), web.url()) == "gef\u00fcllt"


async def test_a_name_is_connected_to_the_address_that_was_checked(web: Web, inner: Web) -> None:
    """A second answer of the resolver, as in DNS rebinding, is never asked for."""
    answers = [["93.184.215.14"], ["127.0.0.1"]]
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers.pop(0)

    connected: list[str] = []
    target = fetcher(resolve=rebinding)

    class Recorder:
        async def connect_tcp(self, host: str, port: int, *more: object) -> object:
            connected.append(host)
            raise ToolError("connected")

    target._backend._inner = Recorder()  # type: ignore[assignment]
    with pytest.raises(ToolError, match="connected"):
        await get(target, f"http://rebind.test:{inner.port}/")
    assert (asked, connected) == (["rebind.test"], ["93.184.215.14"])


async def test_one_private_address_among_public_ones_is_enough_to_refuse(inner: Web) -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["93.184.215.14", "127.0.0.1"]

    assert await reason(fetcher(resolve=mixed), f"http://mixed.test:{inner.port}/") == "ADDRESS_REFUSED"


async def test_five_redirects_are_followed_and_not_six(web: Web) -> None:
    for number in range(7):
        web.answers[f"/{number}"] = redirect(f"{number + 1}")
    web.answers["/7"] = response(b"end")
    assert await get(fetcher(web.place), web.url("/2")) == "end"
    assert await reason(fetcher(web.place), web.url("/1")) == "TOOL_FAILED"


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "304 Not Modified", "300 Multiple"])
async def test_other_statuses_are_told(web: Web, status: str) -> None:
    web.answers["/"] = response(b"x", status=status) if status[0] != "3" else response(b"", status=status)
    with pytest.raises(ToolError, match=status[:3]):
        await get(fetcher(web.place), web.url())


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "application/pdf", ""])
async def test_only_text_html_and_json_are_read(web: Web, kind: str) -> None:
    web.answers["/"] = response(b"x", kind)
    with pytest.raises(ToolError, match="only text, HTML and JSON"):
        await get(fetcher(web.place), web.url())


@pytest.mark.parametrize("kind", ["application/json", "application/problem+json", "text/plain", "Text/HTML"])
async def test_text_of_all_kinds_is_read(web: Web, kind: str) -> None:
    web.answers["/"] = response(b'{"a": 1}', kind)
    assert await get(fetcher(web.place), web.url()) == '{"a": 1}'


async def test_a_large_page_is_cut_and_the_rest_not_read(web: Web) -> None:
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    web.answers["/"] = endless
    page = await fetcher(web.place).get(web.url(), lambda text: None)
    assert (len(page.body), page.cut) == (MAX_BYTES, True)
    # What the sockets held beyond the cap, and no more.
    assert sent < 20 * MAX_BYTES


async def test_a_packed_page_is_unpacked(web: Web) -> None:
    web.answers["/"] = response(gzip.compress(b"hello"), "text/plain", "200 OK", "Content-Encoding: gzip")
    assert await get(fetcher(web.place), web.url()) == "hello"


async def test_a_page_of_several_gzip_members_is_whole_and_half_a_one_says_so(web: Web) -> None:
    members = gzip.compress(b"hello ") + gzip.compress(b"again")
    for body, incomplete in ((members, False), (members[:-3], True)):
        web.answers["/"] = response(body, "text/plain", "200 OK", "Content-Encoding: gzip")
        page = await fetcher(web.place).get(web.url(), lambda text: None)
        assert page.body.startswith(b"hello ")
        assert page.incomplete is incomplete


async def test_a_page_that_drips_is_given_up(web: Web) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.01)

    web.answers["/"] = drip
    with pytest.raises(ToolError, match="did not arrive within"):
        await get(fetcher(web.place, total_seconds=0.2), web.url())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Type: text/plain\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/plain\r\n\r\nzz\r\n",
    ],
)
async def test_a_server_that_does_not_speak_http_is_an_error(web: Web, answer: bytes) -> None:
    web.answers["/"] = answer
    assert await reason(fetcher(web.place), web.url()) == "TOOL_FAILED"


async def test_a_closed_port_is_an_error(web: Web) -> None:
    async with Web() as gone:
        place, url = gone.place, gone.url()
    assert await reason(fetcher(place), url) == "TOOL_FAILED"


async def test_a_name_that_does_not_exist_is_an_error() -> None:
    async def nothing(host: str, port: int) -> list[str]:
        raise OSError(-2, "Name or service not known")

    with pytest.raises(ToolError, match=r"nowhere\.test cannot be found"):
        await get(fetcher(resolve=nothing), "http://nowhere.test/")


async def test_the_systems_resolver_gives_addresses() -> None:
    assert await resolve("127.0.0.1", 80) == ["127.0.0.1"]


async def test_https_checks_the_certificate_against_the_name_and_not_the_address() -> None:
    trusting = ssl.create_default_context(cafile=str(TLS / "cert.pem"))

    async def local(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async with Web(tls=True) as web:
        web.answers["/"] = response(b"safe", "text/plain")
        good, bad = f"page.test:{web.port}", f"other.test:{web.port}"
        reader = fetcher(good, bad, resolve=local, tls=trusting)
        assert await get(reader, f"https://{good}/") == "safe"
        with pytest.raises(ToolError, match="cannot be reached securely"):
            await get(reader, f"https://{bad}/")
        with pytest.raises(ToolError, match="cannot be reached securely"):
            await get(fetcher(good, resolve=local), f"https://{good}/")
