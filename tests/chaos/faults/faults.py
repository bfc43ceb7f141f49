"""Faults: each breaks something, says so in the history, and puts it right again before it returns."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import redis.asyncio
import redis.exceptions

import gateway.server
import services.agent.app
import services.session.app
import services.tool.app
from bench.mesh import Replica
from meshkit import failpoints
from tests.chaos.faults.audit import Audit
from tests.chaos.faults.cluster import Cluster
from tests.chaos.faults.stores import Store
from tests.chaos.model.history import Recorder

# Their points are known once they are imported.
_PROCESSES = (gateway.server, services.agent.app, services.session.app, services.tool.app)
LEASE_TTL = 10.0
SERVICES = ("agent", "session", "tool", "gateway")
# Longest that a point may stay armed without anybody coming by.
_ARMED_SECONDS = 4.0
# After which an agent has certainly given up a session replica that does not answer.
_LATE_SECONDS = 13.0
_BALLAST = "ballast"
_LEFT_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Stage:
    """What faults work on."""

    cluster: Cluster
    audit: Audit
    recorder: Recorder
    rng: random.Random

    @asynccontextmanager
    async def broken(self, fault: str, target: str = "", detail: str = "") -> AsyncIterator[None]:
        """Writes the beginning of a fault and its end down."""
        self.recorder.write("fault", fault=fault, target=target, detail=detail)
        try:
            yield
        finally:
            self.recorder.write("healed", fault=fault, target=target)


Fault = Callable[[Stage], Awaitable[None]]


def points() -> list[str]:
    """Every named point of the processes that faults are aimed at."""
    assert all(_PROCESSES)
    return [
        name for name in failpoints.names() if name.startswith(("agent.", "session.", "tool.", "gateway."))
    ]


async def point(stage: Stage) -> None:
    """Crashes whichever replica comes by a named point first, at its first to fifth time there."""
    name = stage.rng.choice(points())
    action = stage.rng.choices(["crash", "hang:1.5"], weights=[6, 1])[0]
    await at_point(stage, name, f"{action}@{stage.rng.choice([1, 1, 1, 2, 3, 5])}")


async def at_point(stage: Stage, name: str, action: str, seconds: float = _ARMED_SECONDS) -> None:
    """Arms a point and waits until somebody was hit there, or nobody came."""
    armed = stage.cluster.failpoints / name
    async with stage.broken("point", name, action):
        armed.with_suffix(".arming").write_text(action)
        # By rename: nobody reads half an action.
        armed.with_suffix(".arming").rename(armed)
        try:
            async with asyncio.timeout(seconds):
                while armed.exists():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            armed.unlink(missing_ok=True)
            stage.recorder.write("mark", text=f"nobody came by {name}")


async def kill(stage: Stage) -> None:
    """kill -9 of one replica."""
    service = stage.rng.choices([*SERVICES, "memory"], weights=[5, 4, 3, 3, 1])[0]
    await kill_one(stage, service)


async def kill_one(stage: Stage, service: str) -> None:
    """kill -9 of one replica of a service; the supervisor starts its successor."""
    living = stage.cluster.of(service)
    if living:
        await kill_this(stage, stage.rng.choice(living))


async def kill_agent(stage: Stage) -> None:
    """kill -9 of one agent."""
    await kill_one(stage, "agent")


async def kill_gateway(stage: Stage) -> None:
    """kill -9 of one gateway."""
    await kill_one(stage, "gateway")


async def kill_this(stage: Stage, victim: Replica) -> None:
    """kill -9 of this replica."""
    async with stage.broken("kill", victim.replica):
        stage.cluster.signal(victim, signal.SIGKILL)


async def kill_envoy(stage: Stage) -> None:
    """kill -9 of Envoy: every path between services is gone until it is back."""
    await kill_one(stage, "envoy")


async def drain(stage: Stage) -> None:
    """SIGTERM of one replica."""
    victim = stage.rng.choice(stage.cluster.of(stage.rng.choice(SERVICES)))
    async with stage.broken("drain", victim.replica):
        stage.cluster.signal(victim, signal.SIGTERM)


async def freeze(stage: Stage) -> None:
    """SIGSTOP for longer than a lease lasts, then SIGCONT: the stale owner comes back and tries to write."""
    await stop_one(
        stage,
        "freeze",
        stage.rng.choices(SERVICES, weights=[6, 3, 3, 1])[0],
        LEASE_TTL + stage.rng.uniform(1, 3),
    )


async def pause(stage: Stage) -> None:
    """SIGSTOP for a shorter time than a lease lasts."""
    await stop_one(stage, "pause", stage.rng.choice(SERVICES), stage.rng.uniform(0.5, 4))


async def stop_one(stage: Stage, fault: str, service: str, seconds: float) -> None:
    """SIGSTOP of one replica of a service for some seconds."""
    living = stage.cluster.of(service)
    if not living:
        return
    victim = stage.rng.choice(living)
    async with stage.broken(fault, victim.replica, f"{seconds:.1f} s"):
        stage.cluster.signal(victim, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            stage.cluster.signal(victim, signal.SIGCONT)


async def network(stage: Stage) -> None:
    """Cuts, holds, delays or swallows what passes on one path."""
    route = stage.rng.choices(["postgres", "valkey", "mesh", "model", "ledger"], weights=[4, 2, 4, 2, 3])[0]
    mode = stage.rng.choice(["cut", "refuse", "hold", "delay", "swallow"])
    seconds = {"cut": 0.0, "delay": 4.0}.get(mode, stage.rng.uniform(0.3, 4))
    await on_route(stage, route, mode, seconds)


async def on_route(
    stage: Stage,
    route: str,
    mode: str,
    seconds: float,
    pids: tuple[int, ...] = (),
    delays: tuple[float, float] = (0.02, 0.3),
) -> None:
    """Has a proxy misbehave for some seconds; `delays` bounds what is drawn for "delay", in seconds."""
    async with stage.broken("network", route, f"{mode} {seconds:.1f} s"):
        delay = stage.rng.uniform(*delays)
        await stage.cluster.proxies.set(route, mode, seconds=delay, pids=list(pids))
        try:
            await asyncio.sleep(seconds)
        finally:
            await stage.cluster.proxies.set(route, "pass")


async def partition(stage: Stage) -> None:
    """Cuts one agent, session or tool replica off from all others; it lives, and its model goes on."""
    service = stage.rng.choices(["agent", "session", "tool", "gateway"], weights=[5, 2, 3, 1])[0]
    living = stage.cluster.of(service)
    if not living:
        return
    victim = stage.rng.choice(living)
    route = "postgres" if service == "session" and stage.rng.random() < 0.7 else "mesh"
    seconds = stage.rng.choice([stage.rng.uniform(1, 5), LEASE_TTL + 1.5])
    mode = stage.rng.choice(["hold", "refuse", "swallow"])
    stage.recorder.write("mark", text=f"partition of {victim.replica} on {route}")
    await on_route(stage, route, mode, seconds, (victim.pid,))


async def late_flush(stage: Stage) -> None:
    """A session replica stops with appends in its hands, and goes on when their runs have moved elsewhere.

    The agents give it up after some seconds and re-attach under a new fence on another replica. That one is
    held up right after the first re-attachment, and the stopped one let go: what it still has to write is of
    an old fence, and finds the log exactly where it expects it.
    """
    living = stage.cluster.of("session")
    if len(living) < 2:
        return
    victim = stage.rng.choice(living)
    async with stage.broken("late_flush", victim.replica):
        stage.cluster.signal(victim, signal.SIGSTOP)
        try:
            await at_point(stage, "session.reattach.after", "hang:2.5", seconds=_LATE_SECONDS)
        finally:
            stage.cluster.signal(victim, signal.SIGCONT)


async def flush(stage: Stage) -> None:
    """FLUSHALL."""
    async with stage.broken("flushall", "valkey"):
        client = redis.asyncio.Redis.from_url(stage.cluster.valkey.url, socket_timeout=2)
        try:
            await client.flushall()
        except (redis.exceptions.RedisError, OSError) as error:
            stage.recorder.write("mark", text=f"FLUSHALL: {type(error).__name__}")
        finally:
            await client.aclose()


async def valkey_down(stage: Stage) -> None:
    """Valkey killed, and started again empty after a while."""
    await _down(stage, stage.cluster.valkey, signal.SIGKILL, stage.rng.uniform(0.5, 6))


async def postgres_down(stage: Stage) -> None:
    """PostgreSQL's immediate stop or kill -9, and a start with recovery after a while."""
    how = stage.rng.choice([signal.SIGQUIT, signal.SIGQUIT, signal.SIGINT])
    await _down(stage, stage.cluster.postgres, how, stage.rng.uniform(0.2, 4))


async def _down(stage: Stage, store: Store, how: signal.Signals, seconds: float) -> None:
    async with store.down, stage.broken("down", store.name, f"{how.name} for {seconds:.1f} s"):
        await store.stop(how)
        try:
            await asyncio.sleep(seconds)
        finally:
            await store.start()


async def disk_full(stage: Stage) -> None:
    """PostgreSQL's disk has no byte left for a while."""
    if stage.cluster.disk is None:
        stage.recorder.write("mark", text="no right to mount a disk that can be filled")
        return
    ballast = stage.cluster.disk / _BALLAST
    async with stage.broken("disk_full", "postgres"):
        try:
            _fill(ballast)
            await asyncio.sleep(stage.rng.uniform(1, 4))
        finally:
            ballast.unlink(missing_ok=True)


def _fill(ballast: Path) -> None:
    """Takes what room there is; PostgreSQL takes of it at the same time."""
    with ballast.open("wb") as file:
        while True:
            free = os.statvfs(ballast.parent)
            size = os.fstat(file.fileno()).st_size + free.f_bavail * free.f_frsize - _LEFT_BYTES
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            else:
                return


async def clock(stage: Stage) -> None:
    """PostgreSQL's clock jumps, forward beyond every lease or back, and returns."""
    seconds = stage.rng.choice([15.0, 3600.0, -5.0, -30.0])
    async with stage.broken("clock", "postgres", f"{seconds:+.0f} s"):
        await stage.audit.set_clock(seconds)
        try:
            await asyncio.sleep(stage.rng.uniform(0.5, 3))
        finally:
            await stage.audit.set_clock(0)
