"""A tool whose outcome nobody knows."""

from collections.abc import Mapping
from typing import Any

from services.tool.registry import Effect, OutcomeUnknownError, ToolContext, tool


@tool("lose", description="Loses the answer.", input_schema={"type": "object"}, effect=Effect.NON_IDEMPOTENT)
async def lose(arguments: Mapping[str, Any], context: ToolContext) -> str:
    raise OutcomeUnknownError("no answer came")
