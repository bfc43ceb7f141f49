"""Runs the scenarios on the mesh and on one peer, turn about, so that both see the same machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from bench.facts import facts
from bench.load import LoadError
from bench.measure import Run, measure
from bench.mesh import Mesh
from bench.peers.install import versions
from bench.peers.kept import Kept, kept
from bench.peers.server import Running
from bench.peers.targets import PeerTarget
from bench.results import Result
from bench.run import warm_up
from bench.scenarios import SCENARIOS, Replies
from bench.target import IncompleteReply
from bench.targets import MeshTarget

# Of the bench's own scenarios, as many questions and tokens as the slowest peer answers in half a minute.
_ASKS = {"clients_1": (20, 200), "clients_32": (3, 200), "paced_100": (1, 200)}
# Replies of four seconds that began over longer would not all run at once.
_SPREAD = 1.0
_SHOWN = 400
Said = Callable[[str], None]


def scenarios(names: Sequence[str] = ()) -> list[Replies]:
    """Returns the scenarios for peers, or those named."""
    return [
        replace(one, asks=_ASKS[one.name][0], tokens=_ASKS[one.name][1], spread=min(one.spread, _SPREAD))
        for one in SCENARIOS
        if isinstance(one, Replies) and one.name in _ASKS and (not names or one.name in names)
    ]


def result_name(target: str, scenario: str) -> str:
    """Returns how the results name what was measured of one target."""
    return f"{target}: {scenario}"


async def mesh_kept(mesh: Mesh) -> Kept:
    """Looks what a mesh's PostgreSQL holds when a client sees a token; the mesh must be fresh."""
    database = mesh.command("env", "HERMESH_DATABASE_URL").strip()
    async with MeshTarget(mesh) as target:
        return await kept(target, database)


async def run_peer(
    mesh: Mesh, peer: Running, chosen: Sequence[Replies], runs: int, ours: Kept, said: Said
) -> list[Result]:
    """Measures all that is asked of a peer.

    Raises:
        IncompleteReply: A reply of the mesh lacks something; of the peer's it is noted in the result instead.
        LoadError: The load generator failed on the mesh.
    """
    results = []
    stores = peer.stores
    for target in peer.targets():
        about = {
            "peer": peer.peer.name,
            "title": peer.peer.title,
            "versions": versions(peer.peer.files, peer.peer.packages) | {"Python": peer.python},
            "durable": target.durable,
            "mesh_kept": asdict(ours),
        }
        # Only once are the stores fresh, and only what promises durability is asked for it.
        if stores is not None and target.durable:
            said(f"{target.name}: what its stores hold when a client sees a token")
            about["kept"] = asdict(await kept(target, stores.postgres_url, stores.redis_url))
        for scenario in chosen:
            name = result_name(target.name, scenario.name)
            result = Result(name, scenario.title, facts() | about | {"target": target.name})
            await _turns(mesh, target, scenario, runs, result, said)
            results.append(result)
    return results


async def _turns(
    mesh: Mesh, target: PeerTarget, scenario: Replies, runs: int, result: Result, said: Said
) -> None:
    assert mesh.model is not None
    model = (mesh.model.url, mesh.model.process.pid)
    async with MeshTarget(mesh) as ours:
        said(f"{target.name}, {scenario.title}: warming up")
        await measure(ours, warm_up(scenario), model)
        warmed = await _theirs(target, warm_up(scenario), model)
        for number in range(runs if isinstance(warmed, Run) else 0):
            said(f"{target.name}, {scenario.title}: run {number + 1} of {runs}")
            mine = await measure(ours, scenario, model)
            theirs = await _theirs(target, scenario, model)
            if not isinstance(theirs, Run):
                warmed = theirs
                break
            result.runs += [mine, theirs]
    if not isinstance(warmed, Run):
        said(f"{target.name}, {scenario.title}: {warmed}")
        result.facts["failed"] = warmed


async def _theirs(target: PeerTarget, scenario: Replies, model: tuple[str, int]) -> Run | str:
    """Measures a peer once; returns what went wrong, for the page, where its replies are not whole."""
    try:
        return await measure(target, scenario, model)
    except (IncompleteReply, LoadError) as error:
        return str(error)[:_SHOWN]
