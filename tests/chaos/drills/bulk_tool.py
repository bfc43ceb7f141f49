"""A tool without effect whose results are large and do not compress."""

import itertools
import random
from collections.abc import Mapping
from typing import Any

from services.tool.registry import Effect, ToolContext, tool

_SEEDS = itertools.count()


@tool(
    "bulk",
    description="Returns so many characters.",
    input_schema={
        "type": "object",
        "properties": {"characters": {"type": "integer", "maximum": 64_000}},
        "required": ["characters"],
    },
    effect=Effect.PURE,
    timeout=10.0,
)
async def bulk(arguments: Mapping[str, Any], context: ToolContext) -> str:
    return random.Random(next(_SEEDS)).randbytes(int(arguments["characters"]) // 2).hex()
