"""HTML to the text that a person would read, with the standard library's parser."""

from __future__ import annotations

import codecs
import re
from html.parser import HTMLParser

import webencodings  # type: ignore[import-untyped]

_SKIPPED = frozenset({"script", "style", "noscript", "template", "svg", "math", "iframe", "object", "canvas"})
# Elements without an end tag: nothing is inside, so skipping or indenting must not wait for one.
_VOID = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
)
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog"}
    | {"dir", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "header", "hgroup"}
    | {"h1", "h2", "h3", "h4", "h5", "h6", "hr", "html", "legend", "li", "main", "menu", "nav", "ol"}
    | {"option", "p", "pre", "search", "section", "select", "summary", "table", "tbody", "tfoot", "thead"}
    | {"tr", "ul"}
)
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_CELLS = frozenset({"td", "th"})
# Stands for a space of preformatted text, which joining runs of space must leave; for private use in Unicode.
_KEPT_SPACE = "\ue000"
_SPACE = re.compile(r"[ \t\r\f\v\xa0]+")
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9_.:-]{1,40})[\"']")
_CHUNK = 131_072


class _Reader(HTMLParser):
    """Collects text, one list entry a piece, with newlines where blocks begin and end."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.title: list[str] = []
        self._skip: str | None = None
        self._skip_depth = 0
        self._in_title = False
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skip is not None:
            if tag == self._skip:
                self._skip_depth += 1
            return
        if tag in _SKIPPED:
            self._skip, self._skip_depth = tag, 1
        elif tag == "title":
            self._in_title = True
        elif tag == "br":
            self.pieces.append("\n")
        elif tag in _BLOCKS:
            self._open_block(tag)
        elif tag in _CELLS:
            self.pieces.append(" \t")
        elif tag == "img":
            text = dict(attrs).get("alt")
            if text and text.strip():
                self.pieces.append(f" [{text.strip()}] ")

    def _open_block(self, tag: str) -> None:
        self.pieces.append("\n")
        if tag == "pre":
            self._pre += 1
        elif tag in _HEADINGS:
            self.pieces.append(f"\n{_HEADINGS[tag]} ")
        elif tag == "li":
            self.pieces.append("- ")
        elif tag == "p":
            self.pieces.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._skip is not None:
            if tag == self._skip:
                self._skip_depth -= 1
                if not self._skip_depth:
                    self._skip = None
            return
        if tag == "title":
            self._in_title = False
        elif tag in _BLOCKS:
            if tag == "pre" and self._pre:
                self._pre -= 1
            self.pieces.append("\n\n" if tag == "p" or tag in _HEADINGS else "\n")

    def handle_data(self, data: str) -> None:
        if self._skip is not None:
            return
        if self._in_title:
            self.title.append(data)
        elif self._pre:
            self.pieces.append(data.replace(" ", _KEPT_SPACE))
        else:
            # A newline in the source is a space; newlines in `pieces` come from elements.
            self.pieces.append(data.replace("\n", " "))


def html_to_text(html: str) -> tuple[str, str]:
    """Returns a page's title and its text.

    Scripts, styles and the like are left out; headings get `#`, list items `-`; runs of space become one, and
    more than one empty line becomes one.
    """
    reader = _Reader()
    # In pieces, and without close(): what is unfinished at the end is dropped. Deciding what an unfinished
    # tag at the very end means takes the parser quadratic time on hostile input.
    for start in range(0, len(html), _CHUNK):
        reader.feed(html[start : start + _CHUNK])
    rest = reader.rawdata
    if rest and "<" not in rest:
        reader.handle_data(rest)
    title = " ".join("".join(reader.title).split())
    return title, tidy("".join(reader.pieces)).replace(_KEPT_SPACE, " ")


def tidy(text: str) -> str:
    """Joins runs of space, and keeps at most one empty line."""
    lines = [_SPACE.sub(" ", line).strip() for line in text.split("\n")]
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip()


def decode(body: bytes, charset: str, html: bool) -> str:
    """Returns a body as text: by its byte order mark, the server's charset, the page's own, or UTF-8.

    Bytes that are not valid become U+FFFD.
    """
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if body.startswith(mark):
            return body.decode(name, "replace").removeprefix("\ufeff")
    if charset:
        return _by_label(body, charset)
    match = (_CHARSET.search(body[:4096]) or _XML_ENCODING.match(body)) if html else None
    label = match[1].decode("ascii") if match else "utf-8"
    # UTF-16 that says so in ASCII is none: nobody could have read the label.
    return _by_label(body, "utf-8" if label.lower().startswith("utf-16") else label)


def _by_label(body: bytes, label: str) -> str:
    """Decodes by the WHATWG's table of labels, as browsers do: `latin-1` and `ascii` mean windows-1252 there.

    What Python calls a codec but is no charset (zip, rot13) is no label; like any unknown one it stands for
    UTF-8.
    """
    found = webencodings.lookup(label) or webencodings.UTF8
    if found.name == "gbk":
        # Read as its superset, as that table has it.
        return body.decode("gb18030", "replace")
    text: str = found.codec_info.decode(body, "replace")[0]
    return text
