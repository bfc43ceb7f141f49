"""Where an S3 is and what its clients read: light, for those who only pass it on."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

# What an S3 client takes from its environment. Only who has to do with the store may see it.
S3_VARIABLES = frozenset(
    {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_ROLE_ARN",
        "AWS_ROLE_SESSION_NAME",
    }
)
# In the order in which the S3 client looks.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def endpoint() -> tuple[str, str]:
    """The variable that names S3's endpoint, and the endpoint; empty where AWS's own is meant."""
    return next(((name, os.environ[name]) for name in _ENDPOINTS if os.environ.get(name)), ("", ""))


def place(url: str) -> str:
    """Where a store is, for people: without what may be secret."""
    parts = urlsplit(url)
    bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    at = urlsplit(endpoint()[1])
    if parts.scheme != "s3" or not at.netloc:
        return bare
    return f"{bare} at {at.scheme}://{at.netloc.rpartition('@')[2]}"
