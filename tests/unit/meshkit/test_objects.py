"""What an object store's failures mean, by the words of the store and of its client; no store is asked."""

from __future__ import annotations

import errno

import pytest
from obstore.exceptions import BaseError

from meshkit.errors import StartupError
from meshkit.objects import bucket_missing, explain, open_store, predicate
from meshkit.s3 import place

MISSING = (
    "Object at location p/x not found: Error performing GET http://s3:1/b/p/x in 1ms - "
    "Server returned non-2xx status code: 404 Not Found: "
)


def answered(code: str, status: str = "403 Forbidden") -> BaseError:
    return BaseError(f"Server returned non-2xx status code: {status}: <Error><Code>{code}</Code></Error>")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("AuthorizationHeaderMalformed", "set AWS_REGION"),
        ("PermanentRedirect", "set AWS_REGION"),
        ("RequestTimeTooSkewed", "clock"),
        ("ExpiredToken", "AWS_SESSION_TOKEN has expired"),
        ("SlowDown", "overloaded"),
        ("NewAndUnknown", "does not do what it is asked for (NewAndUnknown)"),
    ],
)
def test_codes_of_s3_are_explained(code: str, words: str) -> None:
    assert words in predicate(answered(code))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BaseError("InvalidCertificate(ExpiredContext {"), "has expired"),
        (BaseError("InvalidCertificate(NotValidYetContext {"), "not valid yet"),
        (BaseError("something: dns error"), "its name is not known"),
        (BaseError("Error performing PUT http://169.254.169.254/latest/api/token"), "needs keys"),
        (
            BaseError('Os {\n code: 28,\n kind: StorageFull,\n message: "No space left on device",\n}'),
            "No space left",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "fails: Read-only file system"),
        (TimeoutError(), "does not answer"),
    ],
)
def test_other_failures_are_explained(error: BaseException, words: str) -> None:
    said = explain(error, "file:///objects")
    assert said.startswith("the object store file:///objects ")
    assert words in said
    assert len(said.splitlines()) == 1


def test_an_objects_absence_is_told_from_a_buckets() -> None:
    assert not bucket_missing(FileNotFoundError(f"{MISSING}<Error><Code>NoSuchKey</Code></Error>"))
    assert bucket_missing(FileNotFoundError(f"{MISSING}<Error><Code>NoSuchBucket</Code></Error>"))
    assert bucket_missing(FileNotFoundError(f"{MISSING}404 page not found"))
    assert not bucket_missing(FileNotFoundError("Object at location x not found: No such file or directory"))


def test_a_place_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://ada:secret@s3.example:9000/?key=secret")
    assert place("s3://ada:secret@bucket/prefix?secret=1") == "s3://bucket/prefix at https://s3.example:9000"
    assert place("file:///objects") == "file:///objects"


@pytest.mark.parametrize("endpoint", ["s3.example:9000", "//s3.example", "ftp://s3.example", "http://"])
def test_an_endpoint_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(
        StartupError, match=r"^AWS_ENDPOINT_URL must be http://host:port or https://host:port$"
    ):
        open_store("s3://bucket/prefix")
