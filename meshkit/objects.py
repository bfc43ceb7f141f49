"""Object stores, a folder or S3: opened the same way everywhere, and what is wrong said in one line."""

from __future__ import annotations

import re
from datetime import timedelta
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.exceptions import NotFoundError as _NotFoundError
from obstore.store import ObjectStore, from_url

from meshkit.errors import StartupError
from meshkit.s3 import endpoint, place

# What a store's methods raise when they fail, and, besides, when there is no such object.
FAILURES = (BaseError, OSError, TimeoutError)
NOT_FOUND = (_NotFoundError, FileNotFoundError)

CALL_SECONDS = 20.0
_CONNECT_SECONDS = 3.0
_REQUEST_SECONDS = 10.0
# Of a request that got no answer, or that the store could not serve: again at once, and once more.
_RETRIES = 2
_NO_TLS = "does not speak TLS: begin AWS_ENDPOINT_URL with http://"
_TLS = "speaks TLS: begin AWS_ENDPOINT_URL with https://"
_RIGHTS = "they need s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket"

# What S3 calls its errors, and what to do about them.
_CODES = {
    "InvalidAccessKeyId": "does not know the key in AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "refuses the keys: AWS_SECRET_ACCESS_KEY is not the secret of AWS_ACCESS_KEY_ID",
    "ExpiredToken": "refuses the keys: AWS_SESSION_TOKEN has expired",
    "InvalidToken": "refuses the keys: AWS_SESSION_TOKEN is not valid",
    "AccessDenied": f"does not let these keys in (AccessDenied): is the bucket's name right? {_RIGHTS}",
    "NoSuchBucket": "has no such bucket: make it, or correct HERMESH_OBJECT_STORE_URL",
    "RequestTimeTooSkewed": "refuses requests because this machine's clock is wrong",
    "AuthorizationHeaderMalformed": "has the bucket in another region: set AWS_REGION",
    "PermanentRedirect": "has the bucket in another region, or at another endpoint: set AWS_REGION",
    "SlowDown": "is overloaded (SlowDown)",
    "XMinioStorageFull": "is full",
    "QuotaExceeded": "is full (QuotaExceeded)",
}
# What the client's own words begin or contain, where no S3 answered.
_SIGNS = (
    (
        "UnknownIssuer",
        "has a certificate of an unknown authority: name the authority's file in SSL_CERT_FILE",
    ),
    ("CaUsedAsEndEntity", "has a certificate that is its own authority's: it needs one of a server"),
    ("NotValidForName", "has a certificate for another name than that in AWS_ENDPOINT_URL"),
    ("Expired", "has a certificate that has expired"),
    ("NotValidYet", "has a certificate that is not valid yet: is this machine's clock right?"),
    ("InvalidCertificate", "has a certificate that is not valid"),
    ("InvalidContentType", _NO_TLS),
    ("HTTP request to an HTTPS server", _TLS),
    ("plain HTTP request was sent to HTTPS port", _TLS),
    ("ConnectionRefused", "cannot be reached: the connection is refused"),
    ("dns error", "cannot be reached: its name is not known"),
    ("failed to lookup address", "cannot be reached: its name is not known"),
    ("without LOCATION", "has the bucket in another region: set AWS_REGION"),
    ("TimedOut", "does not answer in time"),
    ("timed out", "does not answer in time"),
)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_SYSTEM = re.compile(r'code: \d+,\s+kind: \w+,\s+message: "([^"]+)"')


def open_store(url: str) -> ObjectStore:
    """Opens an object store; whether it can be reached shows at its first call.

    Args:
        url: `file:///folder` (made if it is not there) or `s3://bucket/prefix`. Keys, region and endpoint of
            S3 come from the usual AWS_* variables; an endpoint that begins with http:// is one without TLS.

    Raises:
        StartupError: The URL or the endpoint is not usable.
    """
    try:
        if url.startswith("file:"):
            return from_url(url, mkdir=True, automatic_cleanup=True)
        return from_url(
            url,
            client_options={
                "timeout": timedelta(seconds=_REQUEST_SECONDS),
                "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
                # Options of ours turn AWS_ALLOW_HTTP off, and who names http:// means it.
                "allow_http": _endpoint_scheme() == "http",
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=CALL_SECONDS)},
        )
    except (BaseError, OSError, ValueError, TypeError) as error:
        # The store's own text may repeat the URL with what is secret in it.
        raise StartupError(
            f"the object store cannot be used ({type(error).__name__}); HERMESH_OBJECT_STORE_URL must be "
            "file:///folder or s3://bucket/prefix"
        ) from error


def _endpoint_scheme() -> str:
    name, found = endpoint()
    if not found:
        return "https"
    parts = urlsplit(found)
    # The client does not check it, and its thread ends where it has another form.
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StartupError(f"{name} must be http://host:port or https://host:port")
    return parts.scheme


def explain(error: BaseException, url: str) -> str:
    """Says in one line what a store's failure means, and what to do where that is known.

    Args:
        error: One of FAILURES.
        url: The store's.
    """
    return f"the object store {place(url)} {predicate(error)}"


def bucket_missing(error: BaseException) -> bool:
    """Whether "not found" is said of the bucket, or by what is no S3, and not of an object."""
    said = str(error)
    if code := _CODE.search(said):
        return code[1] != "NoSuchKey"
    return _STATUS.search(said) is not None


def predicate(error: BaseException) -> str:
    """The same without what it is said of."""
    said = str(error)
    if code := _CODE.search(said):
        return _CODES.get(code[1], f"does not do what it is asked for ({code[1]})")
    # The client asks the cloud's own machines for keys where it is given none.
    if "169.254." in said or "credential" in said.lower():
        return "needs keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    for sign, meaning in _SIGNS:
        if sign in said:
            return meaning
    if status := _STATUS.search(said):
        return f"answers as no S3 does (status {status[1]}): is AWS_ENDPOINT_URL right?"
    if system := _SYSTEM.search(said):
        return f"fails: {system[1]}"
    if isinstance(error, OSError) and error.strerror:
        return f"fails: {error.strerror}"
    return "does not answer"
