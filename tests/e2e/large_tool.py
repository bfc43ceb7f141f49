"""A tool whose result is too large for the journal."""

from collections.abc import Mapping
from typing import Any

from services.tool.registry import Effect, ToolContext, tool

LINE = "a line of a long answer\n"


@tool(
    "long_answer",
    description="Answers at length.",
    input_schema={
        "type": "object",
        "properties": {"lines": {"type": "integer", "maximum": 100_000}},
        "required": ["lines"],
    },
    effect=Effect.PURE,
    timeout=1.0,
)
async def long_answer(arguments: Mapping[str, Any], context: ToolContext) -> str:
    return LINE * int(arguments["lines"])
