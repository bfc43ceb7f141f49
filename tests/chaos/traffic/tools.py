"""Tools whose side effects a ledger counts; loaded by the tool service under HERMESH_TOOL_MODULES.

Arguments of all but the last: `before` and `after`, seconds to wait before and after the act; `sum`, a number
with many digits that readers look for.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from typing import Any

from services.tool.registry import Effect, OutcomeUnknownError, ToolContext, ToolError, tool

LEDGER = "CHAOS_LEDGER"
TIMEOUT = 4.0
_CONNECT_SECONDS = 2.0
_SCHEMA = {
    "type": "object",
    "properties": {"before": {"type": "number"}, "after": {"type": "number"}, "sum": {"type": "integer"}},
    "additionalProperties": False,
}


async def exchange(request: Mapping[str, Any]) -> dict[str, Any]:
    """Sends one request to the ledger.

    Raises:
        ToolError: It was not sent.
        OutcomeUnknownError: It was sent, and no answer came.
    """
    host, _, port = os.environ[LEDGER].rpartition(":")
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError) as error:
        raise ToolError("the ledger cannot be reached; nothing was done") from error
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        await writer.drain()
        answer = await reader.readline()
    except OSError as error:
        raise OutcomeUnknownError("the ledger's connection broke") from error
    finally:
        writer.close()
    if not answer.endswith(b"\n"):
        raise OutcomeUnknownError("the ledger did not answer")
    found: dict[str, Any] = json.loads(answer)
    return found


async def _act(name: str, effect: str, arguments: Mapping[str, Any], context: ToolContext) -> str:
    await asyncio.sleep(arguments.get("before", 0))
    call = {
        "tool": name,
        "effect": effect,
        "call": context.call_id,
        "key": context.idempotency_key,
        "run": str(context.run_id),
        "pid": os.getpid(),
    }
    answer = await exchange({"act": call})
    context.progress("acted")
    await asyncio.sleep(arguments.get("after", 0))
    return f"done {answer['acts']}"


@tool("charge", description="Charges.", input_schema=_SCHEMA, effect=Effect.NON_IDEMPOTENT, timeout=TIMEOUT)
async def charge(arguments: Mapping[str, Any], context: ToolContext) -> str:
    """Must not happen twice."""
    return await _act("charge", "non_idempotent", arguments, context)


@tool("reserve", description="Reserves.", input_schema=_SCHEMA, effect=Effect.IDEMPOTENT, timeout=TIMEOUT)
async def reserve(arguments: Mapping[str, Any], context: ToolContext) -> str:
    """May happen again under its key."""
    return await _act("reserve", "idempotent", arguments, context)


@tool("look_up", description="Looks up.", input_schema=_SCHEMA, effect=Effect.PURE, timeout=TIMEOUT)
async def look_up(arguments: Mapping[str, Any], context: ToolContext) -> str:
    """May happen as often as it likes."""
    return await _act("look_up", "pure", arguments, context)


@tool(
    "wire_money",
    description="Wires money.",
    input_schema=_SCHEMA,
    effect=Effect.NON_IDEMPOTENT,
    timeout=TIMEOUT,
    requires_approval=True,
)
async def wire_money(arguments: Mapping[str, Any], context: ToolContext) -> str:
    """Must not happen twice, nor before somebody agreed."""
    return await _act("wire_money", "non_idempotent", arguments, context)


@tool(
    "pages",
    description="Reads pages.",
    input_schema={
        "type": "object",
        "properties": {"characters": {"type": "integer", "maximum": 60_000}},
        "required": ["characters"],
    },
    effect=Effect.PURE,
    timeout=TIMEOUT,
)
async def pages(arguments: Mapping[str, Any], context: ToolContext) -> str:
    """Answers at length, and does nothing outside."""
    line = f"{context.call_id} "
    return (line * (arguments["characters"] // len(line) + 1))[: arguments["characters"]]
