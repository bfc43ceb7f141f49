import pytest

from services.tool.builtin.fetch.url import Place, join, parse_url
from services.tool.registry import ToolError


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("http://example.com", Place("http", "example.com", 80, "/")),
        ("HTTPS://Example.COM:8443/a?b=c#d", Place("https", "example.com", 8443, "/a?b=c")),
        (" http://example.com./ ", Place("http", "example.com.", 80, "/")),
        ("http://[2606:4700::1111]:81/", Place("http", "2606:4700::1111", 81, "/")),
        ("http://bücher.example/ä?q=ö", Place("http", "xn--bcher-kva.example", 80, "/%C3%A4?q=%C3%B6")),
        ("http://example.com/%41%2F?x=%20", Place("http", "example.com", 80, "/%41%2F?x=%20")),
        ("http://2130706433/", Place("http", "2130706433", 80, "/")),
        ("http://example.com/'a'", Place("http", "example.com", 80, "/'a'")),
        ('http://example.com/<b>|"', Place("http", "example.com", 80, "/%3Cb%3E%7C%22")),
    ],
)
def test_urls_become_the_parts_that_are_connected_to(text: str, place: Place) -> None:
    assert parse_url(text) == place
    assert place.target.isascii()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.com",
        "//example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "javascript:alert(1)",
        "data:text/html,x",
        "http://",
        "http:///path",
        "http://user@example.com/",
        "http://user:secret@example.com/",
        "http://@example.com/",
        "http://example.com:0/",
        "http://example.com:65536/",
        "http://example.com:x/",
        "http://exam ple.com/",
        "http://example.com/a b",
        "http://example.com/\r\nHost: x",
        "http://example.com\\@127.0.0.1/",
        "http://[::1",
        "http://[fe80::1%25eth0]/",
        "http://[v1.x]/",
        "http://exa$mple.com/",
        "http://-/",
        "http://" + "a" * 254 + "/",
        "http://example.com/" + "a" * 2048,
        "http://\u2100.example/",
    ],
)
def test_what_is_no_plain_http_url_is_refused(text: str) -> None:
    with pytest.raises(ToolError) as caught:
        parse_url(text)
    assert caught.value.reason == "TOOL_ARGUMENTS_INVALID"
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("location", "place"),
    [
        ("/b", Place("http", "example.com", 81, "/b")),
        ("c?d", Place("http", "example.com", 81, "/a/c?d")),
        ("//other.example/x", Place("http", "other.example", 80, "/x")),
        ("https://other.example/", Place("https", "other.example", 443, "/")),
    ],
)
def test_a_redirect_is_read_against_where_it_came_from(location: str, place: Place) -> None:
    assert join(parse_url("http://example.com:81/a/b"), location) == place


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://u:p@example.com/", "ftp://example.com/"])
def test_a_redirect_gets_no_more_than_a_url(location: str) -> None:
    with pytest.raises(ToolError):
        join(parse_url("http://example.com/"), location)


def test_a_place_is_written_without_its_default_port() -> None:
    assert str(Place("https", "::1", 443, "/x")) == "https://[::1]/x"
    assert Place("https", "::1", 443, "/x").host_header == "[::1]"
    assert Place("http", "example.com", 8080, "/x").host_header == "example.com:8080"
