"""Questions to the PostgreSQL of a mesh, as somebody with its URL asks them."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg

from bench.mesh import Mesh

SWITCH = "SELECT pg_switch_wal()"


async def asked(mesh: Mesh, *statements: str) -> list[Any]:
    """The first value of each statement's first row, one after the other on one connection."""
    url = await asyncio.to_thread(mesh.command, "env", "HERMESH_DATABASE_URL")
    connection = await asyncpg.connect(url.strip(), timeout=30)
    try:
        return [await connection.fetchval(statement) for statement in statements]
    finally:
        await connection.close()
