"""Requests against the rules in their protos (protovalidate)."""

from __future__ import annotations

from typing import Any

import protovalidate
from google.protobuf.message import Message

from meshkit.errors import FieldViolation, InvalidArgumentError


def validate(message: Message) -> None:
    """Checks a request against its proto's rules.

    Raises:
        InvalidArgumentError: With one violation a broken rule: the field's path and what is wrong.
    """
    found = protovalidate.collect_violations(message)
    if not found:
        return
    violations = [
        FieldViolation(_path(violation.proto), violation.proto.message or "is not valid")
        for violation in found
    ]
    first = violations[0]
    raise InvalidArgumentError(
        "INVALID_ARGUMENT",
        f"{first.field or 'the request'}: {first.description}",
        violations=violations,
    )


def _path(violation: Any) -> str:
    if violation.field is None:
        return ""
    text = ""
    for element in violation.field.elements:
        text += f".{element.field_name}" if text else str(element.field_name)
        subscript = element.subscript
        if subscript is not None:
            key = subscript.value
            text += f'["{key}"]' if isinstance(key, str) else f"[{key}]"
    return text
