"""What is wrong with Redis, in words for people: a cause and a line, without a driver's text or a secret."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import redis.exceptions


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why Redis cannot be used.

    Attributes:
        cause: One word, for metrics.
        text: One line, for people.
        sure: The server said so itself: trying once more would tell the same.
        elsewhere: Another server may do better: this one is not, or no longer, the right one.
    """

    cause: str
    text: str
    sure: bool = False
    elsewhere: bool = False


class TroubledError(redis.exceptions.ConnectionError):
    """No server was found; `trouble` says why."""

    def __init__(self, trouble: Trouble) -> None:
        """Makes an error that is told as this trouble."""
        super().__init__(trouble.text)
        self.trouble = trouble


_ACL = Trouble(
    "acl", "Redis's ACL keeps this user from what is needed; docs/deploy/redis.md lists it", sure=True
)
# By what an error reply begins with, or has in it where a script passes it on.
_REPLIES = (
    (
        ("READONLY",),
        Trouble(
            "read_only",
            "Redis takes no writes: it is a read-only replica, and the URL has to lead to its primary",
            sure=True,
            elsewhere=True,
        ),
    ),
    (("NOPERM", "ACL failure"), _ACL),
    (
        ("WRONGPASS", "NOAUTH", "invalid password", "without any password"),
        Trouble("password", "Redis refuses the user or the password", sure=True),
    ),
    (
        ("MISCONF",),
        Trouble("disk", "Redis takes no writes: it could not save to its disk (MISCONF)", sure=True),
    ),
    (
        ("OOM",),
        Trouble(
            "memory",
            "Redis takes no writes: its memory is full and its maxmemory-policy lets nothing go (OOM)",
            sure=True,
        ),
    ),
    (
        ("NOREPLICAS",),
        Trouble("replicas", "Redis takes no writes: fewer replicas than min-replicas-to-write", sure=True),
    ),
    (("BUSY",), Trouble("busy", "Redis is held up by a script", sure=True)),
    (("LOADING",), Trouble("loading", "Redis still loads its data", sure=True)),
    (
        ("MASTERDOWN",),
        Trouble("primary", "a Redis replica has lost its primary", sure=True, elsewhere=True),
    ),
    (
        ("CLUSTERDOWN",),
        Trouble("cluster", "the Redis Cluster has no server for some slots", sure=True, elsewhere=True),
    ),
    (
        ("UNBLOCKED",),
        Trouble("role", "a Redis server became a replica, or a primary", elsewhere=True),
    ),
    (
        ("MOVED", "ASK", "TRYAGAIN", "CROSSSLOT"),
        Trouble(
            "moved",
            "Redis is a cluster whose slots moved; a URL of one server does not do: redis+cluster://",
            sure=True,
            elsewhere=True,
        ),
    ),
    (
        ("cluster support disabled",),
        Trouble("topology", "Redis is no cluster: the URL is redis:// or rediss://", sure=True),
    ),
    (
        ("unknown command", "Unknown subcommand"),
        Trouble(
            "command",
            "Redis does not know a command: it is a Sentinel, no Redis at all, or older than 6.2",
            sure=True,
        ),
    ),
)
# redis-py takes a reply's first word away where it has a class for it.
_CODES = (
    (redis.exceptions.ReadOnlyError, "READONLY"),
    (redis.exceptions.NoPermissionError, "NOPERM"),
    (redis.exceptions.AuthenticationError, "WRONGPASS"),
    (redis.exceptions.AuthorizationError, "NOPERM"),
    (redis.exceptions.OutOfMemoryError, "OOM"),
    (redis.exceptions.BusyLoadingError, "LOADING"),
    (redis.exceptions.MasterDownError, "MASTERDOWN"),
    (redis.exceptions.ClusterDownError, "CLUSTERDOWN"),
    (redis.exceptions.AskError, "MOVED"),
    (redis.exceptions.TryAgainError, "MOVED"),
    (redis.exceptions.ClusterCrossSlotError, "MOVED"),
)
_BUSY = Trouble("clients", "Redis takes no more clients (maxclients)", sure=True)
_FULL = Trouble("clients", "all connections to Redis that this process may open are in use")
_STRANGE = Trouble("command", "what answers at Redis's address is no Redis", sure=True)
_CLOSED = Trouble("connection", "Redis closes the connection; if it wants TLS, the URL begins with rediss")
_TIMEOUT = Trouble("timeout", "Redis does not answer in time")
_UNREACHED = Trouble("connection", "Redis cannot be reached")


def explain(error: BaseException) -> Trouble | None:
    """Returns what an error of the driver means, or None for one that tells of the data and not of Redis."""
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, TroubledError):
            return one.trouble
    for one in chain:
        if isinstance(one, ssl.SSLError):
            return _tls(one)
    # A refusal while a connection is made is told as an error of the connection, which the reply caused.
    reply = next((found for one in chain if (found := _reply(one)) is not None), None)
    if reply is not None or isinstance(error, redis.exceptions.ResponseError):
        return reply
    if isinstance(error, redis.exceptions.MaxConnectionsError):
        return _FULL
    if "max number of clients" in str(error):
        return _BUSY
    if isinstance(error, redis.exceptions.InvalidResponse):
        return _STRANGE
    if any(isinstance(one, (TimeoutError, redis.exceptions.TimeoutError)) for one in chain):
        return _TIMEOUT
    if any(isinstance(one, (ConnectionResetError, EOFError)) for one in chain) or "closed" in str(error):
        return _CLOSED
    return _UNREACHED


def _reply(error: BaseException) -> Trouble | None:
    text = str(error)
    for kind, code in _CODES:
        if isinstance(error, kind):
            text = f"{code} {text}"
            break
    else:
        if not isinstance(error, redis.exceptions.ResponseError):
            return None
    codes = set(re.findall(r"\b[A-Z]{3,}\b", text))
    for words, trouble in _REPLIES:
        if any(word in codes if word.isupper() else word in text for word in words):
            return trouble
    return None


def _tls(error: ssl.SSLError) -> Trouble:
    if isinstance(error, ssl.SSLCertVerificationError):
        # The library's own short words: "certificate has expired", "self-signed certificate in chain".
        why = error.verify_message
        text = f"Redis's certificate is not accepted ({why}); ssl_ca_certs= in the URL names its authority"
        return Trouble("certificate", text, sure=True)
    text = (
        "TLS with Redis fails: it speaks none (redis:// then), or wants a certificate of ours (ssl_certfile=)"
    )
    return Trouble("tls", text, sure=True)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__
