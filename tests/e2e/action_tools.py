"""Tools whose acts are counted outside of the mesh: each appends a line to the ledger, a file."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.tool.registry import Effect, Reconciled, ToolContext, tool

SCHEMA = {"type": "object", "properties": {"what": {"type": "string"}}, "additionalProperties": False}
# Longer than a takeover and the start of a process, so that a kill finds every call in the middle.
ACT_SECONDS = 12.0
BRIEF_SECONDS = 3.0


def ledger() -> Path:
    return Path(os.environ["ACTIONS_LEDGER"])


def write(kind: str, name: str, context: ToolContext) -> None:
    with ledger().open("a") as file:
        file.write(f"{kind} {name} {context.call_id} {context.idempotency_key}\n")


def did(name: str, context: ToolContext) -> bool:
    return f"act {name} {context.call_id}" in ledger().read_text()


async def acts_then_waits(name: str, context: ToolContext) -> str:
    write("begin", name, context)
    write("act", name, context)
    await asyncio.sleep(ACT_SECONDS)
    return f"{name} done"


@tool("act_once", description="Acts.", input_schema=SCHEMA, timeout=60.0)
async def act_once(arguments: Mapping[str, Any], context: ToolContext) -> str:
    return await acts_then_waits("act_once", context)


@tool("act_again", description="Acts.", input_schema=SCHEMA, effect=Effect.IDEMPOTENT, timeout=60.0)
async def act_again(arguments: Mapping[str, Any], context: ToolContext) -> str:
    return await acts_then_waits("act_again", context)


async def look(arguments: Mapping[str, Any], context: ToolContext) -> str | Reconciled:
    return "found in the ledger" if did("act_known", context) else Reconciled.NOT_DONE


@tool("act_known", description="Acts.", input_schema=SCHEMA, timeout=60.0, reconcile=look)
async def act_known(arguments: Mapping[str, Any], context: ToolContext) -> str:
    return await acts_then_waits("act_known", context)


async def look_late(arguments: Mapping[str, Any], context: ToolContext) -> str | Reconciled:
    write("look", "act_late", context)
    return "found in the ledger" if did("act_late", context) else Reconciled.NOT_DONE


@tool(
    "act_late",
    description="Waits, then acts.",
    input_schema=SCHEMA,
    timeout=BRIEF_SECONDS + 1,
    reconcile=look_late,
    settle_seconds=0.0,
)
async def act_late(arguments: Mapping[str, Any], context: ToolContext) -> str:
    write("begin", "act_late", context)
    await asyncio.sleep(BRIEF_SECONDS)
    write("act", "act_late", context)
    return "act_late done"


@tool("act_approved", description="Acts.", input_schema=SCHEMA, requires_approval=True)
async def act_approved(arguments: Mapping[str, Any], context: ToolContext) -> str:
    write("act", "act_approved", context)
    return "act_approved done"
