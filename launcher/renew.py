"""Replacing what another version's code started: Envoy's successor, each replica, then the former Envoy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from launcher.children import Child, Children
from launcher.errors import LaunchError
from launcher.plan import Plan
from launcher.restart import FAILED_SECONDS, ORDER, Restart

# For so long the former Envoy keeps what came by it: replies that cannot be resumed, and watches over gRPC
# that found it again by a connection that they had.
LEAVE_SECONDS = 60.0
LOOK_SECONDS = 0.25
# What an Envoy with nothing under way needs to end.
END_SECONDS = 3.0

AGAIN = "hermesh up"
Say = Callable[[str], Awaitable[None]]


class Renewal:
    """Brings a mesh that another version started to the code that is here, and no client notices.

    Envoy's successor comes first and listens beside it, on the same ports. The former one takes no new
    connection then, and what has come by it goes: event streams are asked to come back when the replica that
    serves them is replaced, and come by the successor. So it is the last to end. PostgreSQL, Valkey and the
    model go on as they are.

    Args:
        plan: What a replica is.
        children: Those that run.
        restart: Replaces replicas.
        balanced: Returns once Envoy sends calls to these replicas. Raises LaunchError when it does not.
        code: What is here.
        say: Told each step.
    """

    def __init__(
        self,
        plan: Plan,
        children: Children,
        restart: Restart,
        *,
        balanced: Callable[[Sequence[Child]], Awaitable[None]],
        code: str,
        say: Say,
    ) -> None:
        self._plan = plan
        self._children = children
        self._restart = restart
        self._balanced = balanced
        self._code = code
        self._say = say

    async def run(self) -> bool:
        """Replaces what is of another code; returns whether anything was.

        Raises:
            LaunchError: A successor did not come up. It is ended, and what it was to replace goes on.
        """
        stale = [
            child
            for service in ORDER
            for child in sorted(self._children.of(service), key=lambda one: one.spec.number)
            if child.code != self._code
        ]
        for envoy in self._children.of("envoy"):
            if envoy.code != self._code and envoy.spec.number == self._plan.envoy_number:
                await self._succeed(envoy)
        if stale:
            await self._restart.replace(stale, AGAIN)
        former = [
            child
            for child in self._children.all.values()
            if child.spec.service == "envoy" and child.spec.number != self._plan.envoy_number
        ]
        for child in former:
            await self._retire(child)
        return bool(stale or former)

    async def _succeed(self, former: Child) -> None:
        name, number = former.spec.replica, 3 - former.spec.number
        successor = self._children.start(self._plan.envoy_spec(number), None)
        await self._say(f"{name}: starting {successor.spec.replica} beside it")
        began = time.monotonic()
        self._plan.envoy_number = number
        try:
            await self._children.wait_ready([successor])
            await self._balanced([child for service in ORDER for child in self._children.of(service)])
        except LaunchError as error:
            self._plan.envoy_number = former.spec.number
            await self._children.drain(successor, FAILED_SECONDS)
            raise LaunchError(
                f"{error}; stopped before {name} was touched: nothing is lost, and all of it works on as "
                f"before. Mend that, then: {AGAIN}"
            ) from error
        # It is not started again from now on.
        former.stop()
        await self._plan.admin_of(former.spec.number).leave()
        await self._say(f"{name}: {successor.spec.replica} serves after {time.monotonic() - began:.1f} s")

    async def _retire(self, former: Child) -> None:
        name, admin = former.spec.replica, self._plan.admin_of(former.spec.number)
        former.stop()
        await admin.leave()
        began = time.monotonic()
        while (left := await admin.under_way()) and time.monotonic() - began < LEAVE_SECONDS:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)
        await self._children.drain(former, END_SECONDS)
        cut = f", {left} streams were cut" if left else ""
        await self._say(f"{name}: ended after {time.monotonic() - began:.1f} s{cut}")
