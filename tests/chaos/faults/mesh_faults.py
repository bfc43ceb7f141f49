"""Faults around the services: of Envoy and what it reads, the supervisor, the machine; no agent at all."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from launcher import envoy
from tests.chaos.faults.faults import SERVICES, Stage, kill_one, stop_one

# What somebody may have put in the place of an endpoint file; the last two are in order and lead nowhere.
_NOBODY = "a list of nobody"
_WRONG_PLACE = "a place where nobody is"
_BROKEN_FILES = {
    "an empty file": "",
    "no YAML": "resources: [{",
    "another shape": "resources: 7\n",
}


async def envoy_frozen(stage: Stage) -> None:
    """SIGSTOP of Envoy: every connection is there, and nothing passes."""
    await stop_one(stage, "freeze", "envoy", stage.rng.uniform(0.5, 6))


async def endpoints_bad(stage: Stage) -> None:
    """One service's endpoint file is replaced by what is none, or leads nowhere, until somebody says `up`."""
    cluster = stage.cluster
    service = stage.rng.choice([*SERVICES, "memory"])
    what = stage.rng.choice([*_BROKEN_FILES, _NOBODY, _WRONG_PLACE])
    addresses = ["127.0.0.1:1"] if what == _WRONG_PLACE else []
    text = _BROKEN_FILES.get(what) or envoy.render_endpoints(service, addresses)
    file = cluster.mesh.data_dir / "envoy" / "eds" / f"{service}.yaml"
    async with cluster.whole, stage.broken("endpoints", service, what):
        partial = file.with_suffix(".bad")
        partial.write_text("" if what == "an empty file" else text)
        # By rename, as Envoy notices it.
        partial.rename(file)
        try:
            await asyncio.sleep(stage.rng.uniform(0.5, 4))
        finally:
            await cluster.up()


async def supervisor_lost(stage: Stage, *, alone: bool | None = None) -> None:
    """kill -9 of the supervisor, perhaps of a replica that nobody starts again, and `hermesh up`.

    Its children go on, so that `alone`, without such a replica, no client may notice: that is noted as a
    drain. Drawn if None.
    """
    cluster = stage.cluster
    drawn = stage.rng.random() < 0.5
    alone = drawn if alone is None else alone
    noted = _drain(stage, "supervisor") if alone else stage.broken("kill", "supervisor")
    async with cluster.whole, noted:
        try:
            cluster.processes[0].send(signal.SIGKILL)
            await asyncio.sleep(stage.rng.uniform(0, 1))
            if not alone:
                await kill_one(stage, stage.rng.choice(SERVICES))
            await asyncio.sleep(stage.rng.uniform(0, 2))
        finally:
            await cluster.up()


@asynccontextmanager
async def _drain(stage: Stage, service: str) -> AsyncIterator[None]:
    stage.recorder.write("drain", service=service, phase="begin")
    try:
        yield
    finally:
        stage.recorder.write("drain", service=service, phase="end")


async def machine_lost(stage: Stage) -> None:
    """kill -9 of everything, stores and supervisor too; then all of it is started as after a boot."""
    cluster = stage.cluster
    stores = (cluster.postgres, cluster.valkey)
    async with cluster.whole, stores[0].down, stores[1].down, stage.broken("lost", "machine"):
        try:
            for process in cluster.processes:
                process.send(signal.SIGKILL)
            for store in stores:
                store.send_all(signal.SIGKILL)
                await store.stop(signal.SIGKILL)
            _another_boot(stage)
            await asyncio.sleep(stage.rng.uniform(0, 1))
        finally:
            for store in stores:
                await store.start()
            await cluster.up()


def _another_boot(stage: Stage) -> None:
    """Has what the supervisor left behind be of a boot before this one."""
    file = stage.cluster.mesh.data_dir / "state.json"
    with suppress(OSError, ValueError):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"boot": "another"}))


async def scale_zero(stage: Stage) -> None:
    """The last agent is taken away while replies flow, and some are asked for again after a while."""
    cluster = stage.cluster
    async with cluster.whole, stage.broken("scale", "agent", "0"):
        try:
            await cluster.scale("agent", 0)
            await asyncio.sleep(stage.rng.uniform(0, 3))
        finally:
            await cluster.scale("agent", cluster.wanted["agent"])
