import asyncio
import time
import zlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tool.builtin.fetch.client import MAX_BYTES, Body, Page, read_body
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
        (b'<meta charset="latin1">\xe4', "", True, '<meta charset="latin1">ä'),
        (b"<meta http-equiv=x content='text/html; charset=latin1'>\xe4", "", True, None),
        ("ä".encode("utf-8-sig"), "latin1", False, "ä"),
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
    assert await read_body(chunks(b"x" * MAX_BYTES), "") == Body(b"x" * MAX_BYTES)
    assert await read_body(chunks(b"x" * MAX_BYTES, b"y"), "") == Body(b"x" * MAX_BYTES, cut=True)


def packed(data: bytes, wbits: int) -> bytes:
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(data) + packer.flush()


# gzip, zlib, and deflate without a header, which many servers send under that name.
KINDS = [("gzip", 31), ("deflate", 15), ("deflate", -15), ("x-gzip", 31)]


@pytest.mark.parametrize(("encoding", "wbits"), KINDS)
async def test_a_packed_body_is_unpacked_within_the_cap(encoding: str, wbits: int) -> None:
    small = packed(b"hello", wbits)
    assert await read_body(chunks(small[:3], small[3:]), encoding) == Body(b"hello")
    bomb = packed(b"\x00" * (MAX_BYTES * 20), wbits)
    assert len(bomb) < 100_000
    body = await read_body(chunks(bomb), encoding)
    assert (len(body.data), body.cut) == (MAX_BYTES, True)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.integers(0, 3), st.data())
def test_a_body_of_several_gzip_members_is_whole_however_it_arrives(
    members: list[bytes], padding: int, data: st.DataObject
) -> None:
    whole = b"".join(packed(member, 31) for member in members) + b"\x00" * padding
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert asyncio.run(read_body(chunks(*parts), "gzip")) == Body(b"".join(members))


@pytest.mark.parametrize(("encoding", "wbits"), KINDS)
async def test_a_packed_body_that_ends_too_early_says_so(encoding: str, wbits: int) -> None:
    data = bytes(range(256)) * 100
    whole = packed(data, wbits)
    body = await read_body(chunks(whole[: len(whole) // 2]), encoding)
    assert body.incomplete
    assert data.startswith(body.data)
    assert (await read_body(chunks(whole[:1]), encoding)).incomplete
    assert (await read_body(chunks(packed(b"a", 31), packed(b"b", 31)[:7]), "gzip")) == Body(
        b"a", incomplete=True
    )
    shown = render(Page("http://example.com/", "text/plain", "", b"begun", incomplete=True), 100)
    assert "the page ended before it was complete" in shown


async def test_a_body_that_packs_nothing_is_not_read_for_ever() -> None:
    empty = packed(b"", 31)
    count = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal count
        while True:
            count += 1
            yield empty * 1_000

    assert (await read_body(endless(), "gzip")).cut
    assert count * len(empty) * 1_000 < 3 * MAX_BYTES


@pytest.mark.parametrize(("encoding", "data"), [("br", b"x"), ("gzip", b"not gzip at all")])
async def test_a_body_that_cannot_be_unpacked_is_an_error(encoding: str, data: bytes) -> None:
    with pytest.raises(ToolError):
        await read_body(chunks(data), encoding)


@pytest.mark.parametrize(
    ("label", "data", "text"),
    [
        ("iso-8859-1", b"\x93x\x94 \x80", "\u201cx\u201d \u20ac"),
        ("ascii", b"\xe4", "\u00e4"),
        ("gb2312", "\u9555 \u20ac".encode("gb18030"), "\u9555 \u20ac"),
        ("shift_jis", "\u2460".encode("cp932"), "\u2460"),
        ("ks_c_5601-1987", "\ub620".encode("cp949"), "\ub620"),
        (" Windows-31J ", "\u3042".encode("cp932"), "\u3042"),
        ("x-user-defined", b"\xe4", "\uf7e4"),
        ("unicode", "a".encode("utf-16-le"), "a"),
        # No charsets of the web: Python has a codec for each.
        ("utf-7", b"+AOQ-", "+AOQ-"),
        ("rot13", b"a", "a"),
    ],
)
def test_charset_labels_mean_what_they_do_in_a_browser(label: str, data: bytes, text: str) -> None:
    assert decode(data, label, html=False) == text


def test_the_pages_own_label_counts_where_the_server_gave_none() -> None:
    xml = b'<?xml version="1.0" encoding="koi8-r"?><html>\xc1'
    assert decode(xml, "", html=True).endswith("\u0430")
    utf_16 = '<meta charset="utf-16">\u00e4'.encode()
    assert decode(utf_16, "", html=True).endswith("\u00e4")
