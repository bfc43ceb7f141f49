import time
import zlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tool.builtin.fetch.client import MAX_BYTES, Page, read_body
from services.tool.builtin.fetch.text import decode, html_to_text
from services.tool.builtin.fetch.tool import render
from services.tool.registry import ToolError


def test_a_page_reads_like_a_page() -> None:
    title, text = html_to_text(
        """<!doctype html><html><head><title> A &amp; B
        </title><style>p { color: red }</style><script>var x = "<p>no</p>";</script></head>
        <body><h1>Heading</h1><p>First   line<br>second&nbsp;line &eacute;.</p>
        <ul><li>one<li>two</ul>
        <table><tr><td>a<td>b</tr><tr><th>c</th><th>d</th></tr></table>
        <pre>x
  y</pre><noscript>hidden</noscript><svg><text>also</text></svg><img alt="A cat"><img>
        <p>last</body></html>"""
    )
    assert title == "A & B"
    assert text == (
        "# Heading\n\nFirst line\nsecond line é.\n\n- one\n- two\n\na b\n\nc d\n\nx\n  y\n[A cat]\n\nlast"
    )


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        ("a<!-- <p>b</p> -->c", "ac"),
        ("<p>a<p>b", "a\n\nb"),
        ("<script>x", ""),
        ("<style>x</style>after", "after"),
        ("<svg><svg></svg></svg>after", "after"),
        ("<svg/>after", "after"),
        ("</p></div></script>x", "x"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("<![CDATA[x]]>y", "y"),
        ("&lt;b&gt; &#x41;&#66; &nope;", "<b> AB &nope;"),
        ("<b>bo</b>ld", "bold"),
        ("<a href='/x'>link</a>", "link"),
    ],
)
def test_odd_html_still_gives_its_text(html: str, text: str) -> None:
    assert html_to_text(html)[1] == text


@given(st.text(alphabet="<>/!-='\"& abpscript\n", max_size=300))
def test_any_text_can_be_read(html: str) -> None:
    html_to_text(html)


@pytest.mark.parametrize(
    "unit",
    ["<", "<a ", "<a b='", "<!", "<!--", "</", "<p>x", "<script>", "<![CDATA[", "&#x", '<a b="x"c', "<?"],
)
def test_no_page_takes_long(unit: str) -> None:
    html = (unit * (MAX_BYTES // len(unit) + 1))[:MAX_BYTES]
    began = time.perf_counter()
    html_to_text(html)
    assert time.perf_counter() - began < 10.0


@pytest.mark.parametrize(
    ("body", "charset", "html", "text"),
    [
        ("ä".encode(), "", False, "ä"),
        ("ä".encode("latin-1"), "iso-8859-1", False, "ä"),
        ("ä".encode("latin-1"), "", False, "\ufffd"),
        (b'<meta charset="latin-1">\xe4', "", True, '<meta charset="latin-1">ä'),
        (b"<meta http-equiv=x content='text/html; charset=latin-1'>\xe4", "", True, None),
        ("ä".encode("utf-8-sig"), "latin-1", False, "ä"),
        ("ä".encode("utf-16"), "", False, "ä"),
        (b"x", "no-such-charset", False, "x"),
        (b"x", "zip", False, "x"),
        (b"x", "\x00", False, "x"),
    ],
)
def test_the_charset_is_found(body: bytes, charset: str, html: bool, text: str | None) -> None:
    got = decode(body, charset, html)
    assert got == text if text is not None else got.endswith("ä")


def page(body: bytes, content_type: str = "text/html", cut: bool = False) -> Page:
    return Page("http://example.com/", content_type, "", body, cut)


def test_a_page_is_shown_with_its_address_and_title() -> None:
    assert render(page(b"<title>T</title><p>text"), 100) == "URL: http://example.com/\nTitle: T\n\ntext"


def test_json_comes_as_it_is() -> None:
    body = b'{\n  "a":  1\n}'
    assert render(page(body, "application/json"), 100).endswith('\n\n{\n  "a":  1\n}')


def test_what_is_left_out_is_said() -> None:
    shown = render(page(b"x" * 1000, "text/plain", cut=True), 200)
    assert "[800 more characters are left out]" in shown
    assert "larger than 1 MiB" in shown


def test_a_page_without_text_says_so() -> None:
    assert render(page(b"<script>1</script>"), 100).endswith("(the page has no text)")


def test_nul_characters_do_not_reach_the_journal() -> None:
    assert "\x00" not in render(page(b"a\x00b", "text/plain"), 100)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_body_is_cut_at_its_cap() -> None:
    assert await read_body(chunks(b"x" * MAX_BYTES), "") == (b"x" * MAX_BYTES, False)
    assert await read_body(chunks(b"x" * MAX_BYTES, b"y"), "") == (b"x" * MAX_BYTES, True)


@pytest.mark.parametrize(("encoding", "wbits"), [("gzip", 31), ("deflate", 15), ("x-gzip", 31)])
async def test_a_packed_body_is_unpacked_within_the_cap(encoding: str, wbits: int) -> None:
    packer = zlib.compressobj(wbits=wbits)
    small = packer.compress(b"hello") + packer.flush()
    assert await read_body(chunks(small[:3], small[3:]), encoding) == (b"hello", False)
    packer = zlib.compressobj(wbits=wbits)
    bomb = packer.compress(b"\x00" * (MAX_BYTES * 20)) + packer.flush()
    assert len(bomb) < 100_000
    body, cut = await read_body(chunks(bomb), encoding)
    assert (len(body), cut) == (MAX_BYTES, True)


@pytest.mark.parametrize(("encoding", "data"), [("br", b"x"), ("gzip", b"not gzip at all")])
async def test_a_body_that_cannot_be_unpacked_is_an_error(encoding: str, data: bytes) -> None:
    with pytest.raises(ToolError):
        await read_body(chunks(data), encoding)
