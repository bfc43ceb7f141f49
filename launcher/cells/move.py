"""Moving a tenant from one cell to another while it works.

    1. the target holds the tenant (arriving), the source serves it
    2. what there is gets copied
    3. the source freezes it: nothing of it is changed anywhere from here on
    4. the rest is copied, and all of it compared
    5. the edge's table names the target
    6. the source holds it as moved away: the point after which there is no way back but another move
    7. the target serves it

The rows that hold the tenant are the only state: begun again, a move goes on where they say. At no moment do
both serve it, whatever is lost in between, and whichever table an edge's Envoy still has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from launcher.cells import edge
from launcher.cells.copying import SQL, Copier, Held, Say, Side, opened, purge, same_objects
from launcher.cells.table import Cells
from launcher.errors import LaunchError

# Statements of the services are cut off long before.
_WRITERS_SECONDS = 60.0
_LOOK_SECONDS = 0.005
# Clocks of servers that are kept right differ by milliseconds.
_MAX_SKEW_MS = 2000.0


@dataclass(frozen=True, slots=True)
class Moved:
    """What came of a move.

    Attributes:
        sessions: How many were copied, while the tenant worked and while it was frozen.
        results: How many large results were copied.
        runs: How many runs were taken from their agents; the target goes on with them.
        pause_seconds: How long the tenant was frozen; 0 where an earlier try had frozen it.
    """

    sessions: tuple[int, int]
    results: int
    runs: int
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class _Move:
    source: Side
    target: Side
    tenant_id: UUID


async def move(cells: Cells, tag: str, to: str, say: Say) -> Moved:
    """Moves a tenant, or goes on with a move that was broken off.

    Raises:
        LaunchError: It cannot be done, or not now; it says which cell serves the tenant and how to go on.
    """
    async with _open(cells, tag, to) as one:
        state = await _state(one.source, one.tenant_id)
        sessions, results, runs, pause = (0, 0), 0, 0, 0.0
        if state != Held.MOVED:
            skew = await _check(one)
            await one.target.database.execute(SQL["hold_target"], one.tenant_id, one.source.cell.name)
            copier = Copier(one.source, one.target, one.tenant_id)
            early = 0
            if state is None:
                say(f"copying {tag} from {one.source.cell.name} to {to}; it goes on working meanwhile")
                results = await copier.results(say)
                early = await copier.rows(thoroughly=True)
                # What has changed since then is what the pause is for: it shall be little.
                early += await copier.rows(thoroughly=False)
            say(f"freezing {tag} in {one.source.cell.name}")
            began = time.monotonic()
            runs = await freeze(one.source, one.tenant_id, to)
            results += await copier.results(say)
            # Frozen by an earlier try, nobody knows what it had compared.
            late = await copier.rows(thoroughly=state is not None)
            last = await one.target.database.fetchval(SQL["last_position"], one.tenant_id)
            await one.target.database.execute(SQL["go_past"], last)
            async with copier.change() as connection:
                await connection.execute(SQL["allow_for_clocks"], one.tenant_id, skew)
            sessions = (early, late)
        else:
            began = time.monotonic()
        say(f"switching the edge's table to {to}")
        edge.write(cells, {**cells.table(), tag: to})
        if state != Held.MOVED and not await one.source.database.fetchval(SQL["leave"], one.tenant_id):
            edge.write(cells, {**cells.table(), tag: one.source.cell.name})
            raise LaunchError(f"another command took the move of {tag} back; {await _serving(one)}")
        await one.target.database.execute(SQL["free"], one.tenant_id)
        await one.target.database.execute(SQL["wake"])
        pause = time.monotonic() - began if state is None else 0.0
        return Moved(sessions, results, runs, pause)


async def abort(cells: Cells, tag: str, to: str, say: Say) -> None:
    """Takes back a move that has not switched: the source serves the tenant, the target has nothing of it.

    Raises:
        LaunchError: There is nothing to take back, or no way back.
    """
    async with _open(cells, tag, to) as one:
        state = await _state(one.source, one.tenant_id)
        if state == Held.MOVED:
            raise LaunchError(
                f"{tag} is {to}'s already: run the move again without --abort, then move it back to "
                f"{one.source.cell.name}"
            )
        arriving = await _state(one.target, one.tenant_id) == Held.ARRIVING
        if state is None and not arriving:
            raise LaunchError(f"no move of {tag} to {to} is under way; nothing was changed")
        edge.write(cells, {**cells.table(), tag: one.source.cell.name})
        if state is not None and not await one.source.database.fetchval(SQL["thaw"], one.tenant_id):
            raise LaunchError(f"another command has gone on with the move of {tag}; look, and try again")
        await one.source.database.execute(SQL["wake"])
        say(f"{one.source.cell.name} serves {tag} again; deleting what {to} has of it")
        if arriving:
            shared = await same_objects(one.source, one.target)
            await purge(one.target, one.tenant_id, Held.ARRIVING, keep_results=shared)


async def forget(cells: Cells, tag: str, to: str, say: Say) -> int:
    """Deletes what other cells still have of a tenant that was moved to `to`; returns how many sessions.

    Raises:
        LaunchError: A cell cannot be reached, or none has anything of it.
    """
    number, found = 0, False
    async with opened(cells.cell(to)) as target:
        tenant_id = await target.database.fetchval(SQL["tenant_by_name"], tag)
        if tenant_id is None or await _state(target, tenant_id) is not None:
            raise LaunchError(f"{to} does not serve {tag}; nothing was deleted")
        for cell in cells.cells.values():
            if cell.name == to or not cell.secret("DATABASE_URL"):
                continue
            async with opened(cell) as side:
                row = await side.database.fetchrow(SQL["moved_from"], tag)
                if row is None or row["tenant_id"] != tenant_id:
                    continue
                found = True
                say(f"deleting what {cell.name} has of {tag}")
                shared = await same_objects(side, target)
                number += await purge(side, tenant_id, Held.MOVED, keep_results=shared)
    if not found:
        raise LaunchError(f"no other cell whose database is named has anything of {tag}; nothing was deleted")
    return number


async def check_new(cells: Cells, tag: str, to: str) -> None:
    """Raises LaunchError where a tenant has data in the cell that it would be taken from."""
    here = cells.where(tag)
    if here.name == cells.cell(to).name:
        return
    async with opened(here) as side:
        if await side.database.fetchval(SQL["tenant_by_name"], tag) is not None:
            raise LaunchError(
                f"{tag} has data in {here.name}, which it would not see any more: "
                f"hermesh cells move {tag} --to {to}"
            )


async def freeze(source: Side, tenant_id: UUID, to: str) -> int:
    """Freezes a tenant; returns how many runs were held, once nothing of it can be changed in this cell.

    Raises:
        LaunchError: A transaction that began before does not end.
    """
    database = source.database
    await database.execute(SQL["hold_source"], tenant_id, to)
    open_ = [row["virtualtransaction"] for row in await database.fetch(SQL["writers"])]
    deadline = time.monotonic() + _WRITERS_SECONDS
    while open_:
        open_ = [row["virtualtransaction"] for row in await database.fetch(SQL["still_open"], open_)]
        if open_ and time.monotonic() > deadline:
            raise LaunchError(
                f"a transaction in {source.cell.name}'s database does not end (pg_locks.virtualtransaction "
                f"{', '.join(open_)}); the tenant is frozen: end it and move again, or --abort"
            )
        if open_:
            await asyncio.sleep(_LOOK_SECONDS)
    return len(await database.fetch(SQL["take_leases"], tenant_id))


@asynccontextmanager
async def _open(cells: Cells, tag: str, to: str) -> AsyncIterator[_Move]:
    """Opens both cells and finds the tenant and where it comes from."""
    async with opened(cells.cell(to)) as target:
        name = cells.where(tag).name
        if name == to:
            # Broken off after the switch, if at all: the target knows where from.
            tenant_id = await target.database.fetchval(SQL["tenant_by_name"], tag)
            row = None if tenant_id is None else await target.database.fetchrow(SQL["state"], tenant_id)
            if row is None or row["state"] != Held.ARRIVING:
                raise LaunchError(f"{tag} is in {to} already; nothing was changed")
            name = row["cell"]
        async with opened(cells.cell(name)) as source:
            tenant_id = await source.database.fetchval(SQL["tenant_by_name"], tag)
            if tenant_id is None:
                raise LaunchError(f"cell {name} has no tenant {tag}; nothing was changed")
            try:
                yield _Move(source, target, tenant_id)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
                raise LaunchError(
                    f"the move was broken off ({type(error).__name__}: {_line(error)}); "
                    "run it again to go on, or with --abort to take it back"
                ) from error


async def _serving(one: _Move) -> str:
    state = await _state(one.target, one.tenant_id)
    return f"{one.source.cell.name if state else one.target.cell.name} serves it"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


async def _state(side: Side, tenant_id: UUID) -> Held | None:
    row = await side.database.fetchrow(SQL["state"], tenant_id)
    return None if row is None else Held(row["state"])


async def _check(one: _Move) -> float:
    """Checks that the two cells fit; returns by how many ms their clocks may differ."""
    source, target = one.source, one.target
    found = [
        [tuple(row) for row in await side.database.fetch(SQL["migrations"])] for side in (source, target)
    ]
    if found[0] != found[1]:
        raise LaunchError(
            f"the schemas of {source.cell.name} and {target.cell.name} differ: bring both to one version "
            "(hermesh migrate); nothing was changed"
        )
    state = await _state(target, one.tenant_id)
    if state not in (None, Held.ARRIVING):
        raise LaunchError(
            f"{target.cell.name} has an old copy of this tenant, which was moved away from there: delete it "
            f"first, with --to {source.cell.name} --forget"
        )
    row = await one.source.database.fetchrow(SQL["get_tenant"], one.tenant_id)
    there = await target.database.fetchval(SQL["tenant_by_name"], row["name"] if row else "")
    if state is None and there is not None:
        raise LaunchError(f"{target.cell.name} has a tenant of this name already; nothing was changed")
    before = await source.database.fetchval(SQL["clock"])
    other = await target.database.fetchval(SQL["clock"])
    after = await source.database.fetchval(SQL["clock"])
    skew = max(abs(other - before), abs(other - after))
    if skew > _MAX_SKEW_MS:
        raise LaunchError(
            f"the clocks of the two database servers differ by {skew / 1000:.1f} s: leases and time limits "
            "go by them; set them right first"
        )
    return float(skew)
