"""Each way in which Redis fails is one line; the errors are what redis-py makes of what servers say."""

from __future__ import annotations

import ssl

import pytest
import redis.exceptions
from redis._parsers.base import BaseParser

from meshkit.redis_trouble import Trouble, TroubledError, explain


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ("READONLY You can't write against a read only replica.", "read_only"),
        (
            "ERR Error running script (call to f_1): @user_script:22: -READONLY You can't write against",
            "read_only",
        ),
        ("NOPERM User app has no permissions to run the 'xadd' command", "acl"),
        ("ERR ACL failure in script: User app has no permissions to run the 'xadd' command", "acl"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "password"),
        ("NOAUTH HELLO must be called with the client already authenticated", "password"),
        ("ERR invalid password", "password"),
        ("MISCONF Valkey is configured to save RDB snapshots, but it's unable to persist to disk.", "disk"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "memory"),
        ("NOREPLICAS Not enough good replicas to write.", "replicas"),
        ("LOADING Valkey is loading the dataset in memory", "loading"),
        ("BUSY Valkey is busy running a script.", "busy"),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "primary"),
        ("CLUSTERDOWN Hash slot not served", "cluster"),
        ("MOVED 3999 127.0.0.1:6381", "moved"),
        ("CROSSSLOT Keys in request don't hash to the same slot", "moved"),
        ("ERR This instance has cluster support disabled", "topology"),
        ("ERR unknown command 'EVALSHA', with args beginning with: 'x'", "command"),
        ("ERR max number of clients reached", "clients"),
    ],
)
def test_what_a_server_refuses_has_a_cause(reply: str, cause: str) -> None:
    found = explain(BaseParser.parse_error(reply))
    assert found is not None
    assert found.cause == cause
    assert found.sure
    assert "\n" not in found.text


@pytest.mark.parametrize(
    "reply",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "NOSCRIPT No matching script.",
        "ERR value is not an integer or out of range",
        "ERR user_script:3: attempt to index a nil value TASK",
    ],
)
def test_what_is_wrong_with_the_data_says_nothing_of_redis(reply: str) -> None:
    assert explain(BaseParser.parse_error(reply)) is None


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (redis.exceptions.TimeoutError("Timeout reading from 127.0.0.1:1"), "timeout"),
        (TimeoutError(), "timeout"),
        (
            redis.exceptions.ConnectionError("Error 111 connecting to 127.0.0.1:1."),
            "connection",
        ),
        (redis.exceptions.ConnectionError("Connection closed by server."), "connection"),
        (redis.exceptions.MaxConnectionsError("Too many connections"), "clients"),
        (redis.exceptions.InvalidResponse("Protocol Error: b'HTTP/1.1 400'"), "command"),
    ],
)
def test_what_does_not_come_through_has_a_cause(error: Exception, cause: str) -> None:
    found = explain(error)
    assert found is not None
    assert found.cause == cause


def caused(cause: Exception) -> Exception:
    """An error as redis-py raises it over another."""
    try:
        try:
            raise cause
        except Exception:
            raise redis.exceptions.ConnectionError("secret") from None
    except redis.exceptions.ConnectionError as error:
        return error


def test_tls_is_told_from_the_error_behind() -> None:
    unknown = ssl.SSLCertVerificationError()
    unknown.verify_message = "self-signed certificate in certificate chain"
    found = explain(caused(unknown))
    assert found is not None
    assert found.cause == "certificate"
    assert "self-signed certificate in certificate chain" in found.text
    assert "secret" not in found.text
    found = explain(caused(ssl.SSLError(1, "wrong version number")))
    assert found is not None
    assert found.cause == "tls"


def test_an_error_that_knows_why_says_so() -> None:
    why = Trouble("topology", "nobody knows")
    assert explain(caused(TroubledError(why))) is why


def test_a_password_refused_while_connecting_is_told_as_such() -> None:
    error = redis.exceptions.ConnectionError()
    error.__cause__ = redis.exceptions.AuthenticationError()
    found = explain(error)
    assert found is not None
    assert found.cause == "password"
