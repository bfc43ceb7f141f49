"""The rules on what a caller may set for one run."""

from hermesh.session.v1 import resources_pb2 as resources
from meshkit.errors import FieldViolation, InvalidArgumentError

_MAX_INSTRUCTIONS_BYTES = 256 * 1024
_MAX_STOPS = 16
# Each may ask the model: a run's requests are bounded by them.
_MAX_TURNS = 1000
_MAX_TOOLS = 128


def check_options(options: resources.RunOptions) -> None:
    """Checks run options.

    Raises:
        InvalidArgumentError: INVALID_ARGUMENT that names each field.
    """
    found: list[FieldViolation] = []

    def rule(kept: bool, field: str, description: str) -> None:
        if not kept:
            found.append(FieldViolation(f"options.{field}", description))

    # Written so that NaN breaks the rule.
    if options.HasField("temperature"):
        rule(0 <= options.temperature <= 2, "temperature", "must be from 0 to 2")
    if options.HasField("top_p"):
        rule(0 < options.top_p <= 1, "top_p", "must be above 0 and at most 1")
    rule(options.max_output_tokens >= 0, "max_output_tokens", "must not be negative")
    rule(0 <= options.max_turns <= _MAX_TURNS, "max_turns", f"must be from 0 to {_MAX_TURNS}")
    rule(options.timeout_ms >= 0, "timeout_ms", "must not be negative")
    rule(options.turn_timeout_ms >= 0, "turn_timeout_ms", "must not be negative")
    rule(len(options.stop) <= _MAX_STOPS, "stop", f"must have at most {_MAX_STOPS} entries")
    rule(all(options.stop), "stop", "must not hold an empty entry")
    rule(len(options.tools) <= _MAX_TOOLS, "tools", f"must have at most {_MAX_TOOLS} entries")
    rule(
        len(options.instructions.encode()) <= _MAX_INSTRUCTIONS_BYTES,
        "instructions",
        f"must have at most {_MAX_INSTRUCTIONS_BYTES} bytes",
    )
    texts = (options.model, options.instructions, options.tool_choice, *options.tools, *options.stop)
    rule(not any("\x00" in text for text in texts), "*", "must not hold the character U+0000")
    if found:
        raise InvalidArgumentError("INVALID_ARGUMENT", "the run options are not valid", violations=found)
