r"""JSON Schema of a tool's arguments, as its specification has it, and within bounds.

The library is `jsonschema-rs`. It counts as JSON does: 19.99 is a multiple of 0.01, and 1.0 is an integer.
Patterns are those of ECMA-262 with the flag `u`, as JSON Schema wants them: `\d` is 0 to 9, `\p{L}` and named
groups are known, and `$` is the end and not the line break before it. They run on an engine that cannot
backtrack, so that a match takes time in proportion to the text, whatever the pattern. What such an engine
cannot do, looking ahead or behind and back-references, is refused when the tool is declared.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jsonschema_rs

from meshkit.outside_json import JsonError, JsonTooDeepError, JsonTooLargeError, read_json

MAX_ARGUMENT_BYTES = 1024 * 1024
_MAX_PROBLEMS = 5
_MAX_PROBLEM = 200
# Of longer arguments only the first problem is told: the library finds all before it tells one, and there may
# be one for every other byte.
_MAX_LISTED = 16 * 1024
# What a compiled pattern, and the tables that it makes while it runs, may take: `a{1000}{1000}` is refused.
_PATTERNS = jsonschema_rs.RegexOptions(size_limit=1024 * 1024, dfa_size_limit=2 * 1024 * 1024)


class ArgumentsError(Exception):
    """The arguments do not fit the tool's schema; the text says where, for the model."""


class SchemaError(Exception):
    """A schema is not one that a tool may have; the text says why, for its author."""


class ArgumentSchema:
    """The schema of one tool's arguments.

    Attributes:
        text: The schema as JSON.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        """Compiles a schema.

        Raises:
            SchemaError: It is not JSON Schema, is not for an object, or needs what is outside of it.
        """
        if schema.get("type") != "object":
            raise SchemaError('the input schema must have "type": "object"')
        try:
            self.text = json.dumps(schema, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
            plain = read_json(self.text)
        except (TypeError, ValueError, RecursionError) as error:
            raise SchemaError("the input schema is not JSON, or is nested too deeply") from error
        outside = next((ref for ref in _references(plain) if not ref.startswith("#")), None)
        if outside is not None:
            raise SchemaError(f"the input schema must not refer to {outside}; include it")
        try:
            self._validator = jsonschema_rs.validator_for(
                plain, validate_formats=False, pattern_options=_PATTERNS, retriever=_refuse
            )
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
            raise SchemaError(_why(error)) from error

    def parse(self, text: str) -> dict[str, Any]:
        """Reads and validates the arguments of a call.

        Args:
            text: A JSON object; empty means no arguments.

        Raises:
            ArgumentsError: The text is not a JSON object, or does not fit the schema.
        """
        arguments = parse_object(text)
        try:
            if len(text) <= _MAX_LISTED:
                problems = list(itertools.islice(self._validator.iter_errors(arguments), _MAX_PROBLEMS))
            else:
                problems = []
                self._validator.validate(arguments)
        except jsonschema_rs.ValidationError as problem:
            problems = [problem]
        if problems:
            raise ArgumentsError("; ".join(_explain(problem) for problem in problems))
        return arguments


def parse_object(text: str) -> dict[str, Any]:
    """Reads a JSON object, strictly: at most 1 MiB and 249 levels, no NaN, no infinity; integers are exact.

    Raises:
        ArgumentsError: It is not one.
    """
    if not text.strip():
        return {}
    try:
        read_json(text, max_bytes=MAX_ARGUMENT_BYTES)
    except JsonTooLargeError:
        raise ArgumentsError(f"the arguments are larger than {MAX_ARGUMENT_BYTES} bytes") from None
    except JsonTooDeepError as error:
        raise ArgumentsError(
            f"the arguments are nested too deeply: at most {error.limit} levels are read"
        ) from None
    except JsonError:
        raise ArgumentsError("the arguments are not valid JSON") from None
    # Within bounds by now; and this reader, unlike the other, keeps integers of more than 64 bits.
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ArgumentsError("the arguments must be a JSON object")
    return value


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _refuse(uri: str) -> NoReturn:
    # Nothing in a schema may make the service fetch something.
    raise ValueError(f"{uri} is outside of the schema")


def _why(error: Exception) -> str:
    first = str(error).split("\n", 1)[0][:_MAX_PROBLEM]
    if first.endswith('is not a "regex"'):
        pattern = str(getattr(error, "instance", ""))[:_MAX_PROBLEM]
        return (
            f"the pattern {pattern!r} is refused: it is not one of ECMA-262 with the flag u, is too large, "
            "or looks ahead, behind or back at a group, for which there is no bound in time"
        )
    return f"the input schema is not valid: {first}"


def _explain(problem: jsonschema_rs.ValidationError) -> str:
    where = ".".join(str(part) for part in problem.instance_path)
    text = problem.message
    text = text if len(text) <= _MAX_PROBLEM else text[:_MAX_PROBLEM] + "..."
    return f"{where}: {text}" if where else text
