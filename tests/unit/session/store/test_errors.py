"""What a caller reads of an error in the database."""

from __future__ import annotations

import asyncpg
import pytest

from meshkit.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    HermeshError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from services.session.store.postgres_base import not_found, translate
from services.session.store.postgres_sessions import ordinal_at


def raised(sqlstate: str, reason: str) -> asyncpg.PostgresError:
    error = asyncpg.PostgresError(reason)
    error.sqlstate = sqlstate
    return error


@pytest.mark.parametrize(
    ("sqlstate", "reason", "kind"),
    [
        ("HM404", "SESSION_NOT_FOUND", NotFoundError),
        ("HM404", "TOOL_CALL_NOT_FOUND", NotFoundError),
        ("HM409", "REQUEST_ID_REUSED", AlreadyExistsError),
        ("HM412", "SESSION_BUSY", FailedPreconditionError),
        ("HM412", "ACTION_NOT_REQUIRED", FailedPreconditionError),
    ],
)
def test_a_refusal_raised_by_a_function_keeps_its_reason(
    sqlstate: str, reason: str, kind: type[HermeshError]
) -> None:
    error = translate(raised(sqlstate, reason), {"session_id": "s"})
    assert type(error) is kind
    assert (error.reason, error.metadata) == (reason, {"session_id": "s"})
    assert error.message
    assert reason not in error.message


def test_a_lost_connection_is_unavailable_with_a_time_to_retry() -> None:
    for cause in (ConnectionResetError(), TimeoutError(), asyncpg.ConnectionDoesNotExistError("x")):
        error = translate(cause, {})
        assert isinstance(error, UnavailableError)
        assert error.retry_after_ms


def test_a_drivers_text_never_leaves() -> None:
    error = translate(asyncpg.UniqueViolationError("duplicate key secret"), {})
    assert isinstance(error, InternalError)
    assert "secret" not in error.message


def test_not_found_names_what_was_asked_for() -> None:
    error = not_found("run", "r")
    assert (error.reason, error.metadata) == ("RUN_NOT_FOUND", {"run_id": "r"})


@pytest.mark.parametrize("position", ["x", "-1", str(2**31), "1.5", " "])
def test_a_position_that_is_no_ordinal_is_a_bad_token(position: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ordinal_at(position, 0)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"


def test_no_position_is_the_first_page() -> None:
    assert ordinal_at("", 7) == 7
    assert ordinal_at("3", 7) == 3
