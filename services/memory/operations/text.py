"""What every text must be that comes from outside."""

from __future__ import annotations

from meshkit.errors import FieldViolation, InvalidArgumentError


def invalid(field: str, description: str) -> InvalidArgumentError:
    """Returns the error for one wrong field."""
    return InvalidArgumentError(
        "INVALID_ARGUMENT", f"{field} {description}", violations=[FieldViolation(field, description)]
    )


def storable(field: str, text: str) -> str:
    """Returns a text that PostgreSQL can store.

    Raises:
        InvalidArgumentError: It holds U+0000.
    """
    if "\x00" in text:
        raise invalid(field, "holds U+0000, which cannot be stored")
    return text
