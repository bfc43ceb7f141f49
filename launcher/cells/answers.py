"""What the cells' edge answers by itself: the mesh's own answers, and those about cells away or full."""

from __future__ import annotations

from typing import Any

from launcher import replies
from launcher.replies import Reply
from meshkit.errors import HermeshError, ResourceExhaustedError, UnavailableError

TAG_HEADER = "x-hermesh-tag"
# What the header says of a request that has no tag.
NO_TAG = "-"
_RETRY_MS = 1000
_FULL_RETRY_MS = 2000
# Nobody was reached: no endpoint that is well, none that takes connections, no such cell, no route.
_NOT_REACHED = ("UH", "UF", "NC", "NR")
_FULL = ("UO",)
_WHOSE = {
    f"{NO_TAG}?": "the default cell, which serves keys without a tenant's tag,",
    ".*": f"the cell of tenant %REQ({TAG_HEADER.upper()})%",
}


def _of_cell(
    *flags: str, error: type[HermeshError], status: int, reason: str, text: str, retry_ms: int
) -> list[Reply]:
    """The answer about somebody's cell: which one it is the request's own tag says."""
    found = []
    for pattern, whose in _WHOSE.items():
        when: dict[str, Any] = {
            "and_filter": {
                "filters": [
                    {"response_flag_filter": {"flags": list(flags)}},
                    {
                        "header_filter": {
                            "header": {
                                "name": TAG_HEADER,
                                "string_match": {"safe_regex": {"regex": pattern}},
                                "treat_missing_header_as_empty": True,
                            }
                        }
                    },
                ]
            }
        }
        found.append(Reply(when, error(reason, f"{whose} {text}", retry_after_ms=retry_ms), status))
    return found


def _away() -> list[Reply]:
    return _of_cell(
        *_NOT_REACHED,
        error=UnavailableError,
        status=503,
        reason="CELL_UNAVAILABLE",
        text="cannot be reached; nothing was done, try again",
        retry_ms=_RETRY_MS,
    )


def _full() -> list[Reply]:
    return _of_cell(
        *_FULL,
        error=ResourceExhaustedError,
        status=429,
        reason="OVERLOADED",
        text="is full; nothing was done, try again later",
        retry_ms=_FULL_RETRY_MS,
    )


def http_config() -> str:
    """Returns `local_reply_config` of the edge's HTTP listener, as JSON."""
    return replies.http_config([*_full(), *_away(), *replies.http_replies()])


def grpc_config() -> str:
    """Returns `local_reply_config` of the edge's gRPC listener, as JSON."""
    return replies.grpc_config([*_full(), *_away(), *replies.grpc_replies()])
