"""The form of an API key: `hm_SECRET`, or `hm_TAG_SECRET` with a tag that says whose it is.

The tag is public: it is the tenant's name, so that what stands before several meshes can tell which one has
the tenant without knowing any key. It proves nothing: the whole key does, where it is looked up.
"""

from __future__ import annotations

import re
import secrets

PREFIX = "hm_"
# In a tag no underscore: the first one after it begins the secret.
TAG_PATTERN = "[a-z0-9][a-z0-9-]{0,31}"
_TAG = re.compile(TAG_PATTERN)
_TAGGED = re.compile(f"{PREFIX}({TAG_PATTERN})_.+", re.DOTALL)
_SECRET_BYTES = 24


def tag_of(api_key: str) -> str:
    """Returns a key's tag; empty for one that has none, whatever it looks like."""
    match = _TAGGED.fullmatch(api_key)
    return match[1] if match else ""


def is_tag(text: str) -> bool:
    """Whether a text can be a tag: a to z, 0 to 9 and dashes, 32 of them at most, no dash first."""
    return _TAG.fullmatch(text) is not None


def make_key(tag: str) -> str:
    """Returns a new key with a tag; 192 random bits as hex.

    Raises:
        ValueError: The text can be no tag.
    """
    if not is_tag(tag):
        raise ValueError(f"{tag!r} is no tag: a to z, 0 to 9 and dashes, 32 at most, no dash first")
    return f"{PREFIX}{tag}_{secrets.token_hex(_SECRET_BYTES)}"
