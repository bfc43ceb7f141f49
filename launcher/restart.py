"""Restarting services: replica by replica with each successor first, or all replicas of one at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from launcher.children import Child, Children
from launcher.errors import LaunchError
from launcher.plan import SERVICES, Plan

# Who is called before who calls: with new code or a new tool, no caller is ever newer than what it asks.
# The gateways come last, so that clients are asked to come back once, when all behind is new.
ORDER = ("session", "memory", "tool", "agent", "gateway")
# A successor that nobody needs any more has nothing to finish.
FAILED_SECONDS = 1.0
# Whoever asked hears something this often: a drain may take as long as HERMESH_DRAIN_SECONDS says.
NEWS_SECONDS = 15.0

Say = Callable[[str], Awaitable[None]]


def parse_service(text: str) -> list[str]:
    """Reads a service's name, or `all`; in the order in which they are restarted.

    Raises:
        LaunchError: It is neither.
    """
    if text == "all":
        return list(ORDER)
    if text not in SERVICES:
        raise LaunchError(f"'{text}' is not one of {', '.join(sorted(SERVICES))}, all")
    return [text]


class Restart:
    """Restarts services of a running mesh.

    A successor has a name that no process has: two with one name at a time would write into one log and
    one ready file, and nobody could tell them apart. Names come round again: N replicas use N + 1.

    Args:
        plan: What a replica is.
        children: Those that run.
        number: Gives a service's next replica a number that no process has.
        balanced: Returns once Envoy sends calls to a replica. Raises LaunchError when it does not.
        take_out: Takes a replica out of Envoy's list and ends it, within its grace.
        say: Told each step.
    """

    def __init__(
        self,
        plan: Plan,
        children: Children,
        *,
        number: Callable[[str], int],
        balanced: Callable[[Sequence[Child]], Awaitable[None]],
        take_out: Callable[[Child], Awaitable[None]],
        say: Say,
    ) -> None:
        self._plan = plan
        self._children = children
        self._number = number
        self._balanced = balanced
        self._take_out = take_out
        self._say = say

    def _replicas(self, services: Sequence[str]) -> list[Child]:
        found = [
            child
            for service in services
            for child in sorted(self._children.of(service), key=lambda child: child.spec.number)
        ]
        if not found and len(services) > 1:
            raise LaunchError("nothing runs that could be restarted; start it with: hermesh up")
        if not found:
            name = services[0]
            raise LaunchError(f"no {name} runs, so none is restarted; hermesh scale {name}=1 starts one")
        return found

    async def rolling(self, services: Sequence[str]) -> None:
        """Replaces every replica, one after the other; there are never fewer than before.

        Raises:
            LaunchError: A successor did not come up. It is ended, its predecessor and all that were not
                reached go on as they are.
        """
        again = f"hermesh restart {services[0] if len(services) == 1 else 'all'} --rolling"
        await self.replace(self._replicas(services), again)

    async def replace(self, replicas: Sequence[Child], again: str) -> None:
        """Replaces these replicas in turn; `again` is the command that goes on where it stopped.

        Raises:
            LaunchError: As `rolling`.
        """
        for place, child in enumerate(replicas):
            await self._replace(child, [one.spec.replica for one in replicas[place:]], again)

    async def _replace(self, child: Child, left: Sequence[str], again: str) -> None:
        began = time.monotonic()
        service, name = child.spec.service, child.spec.replica
        successor = self._children.start(self._plan.service(service, self._number(service)), None)
        await self._say(f"{name}: starting {successor.spec.replica} in its place")
        try:
            await self._children.wait_ready([successor])
            await self._balanced([successor])
        except LaunchError as error:
            await self._children.drain(successor, FAILED_SECONDS)
            raise LaunchError(
                f"{error}; stopped before {name} was touched: nothing is lost, and {', '.join(left)} "
                f"work{'s' if len(left) == 1 else ''} on as before. Mend that, then: {again}"
            ) from error
        await self._say(f"{name}: {successor.spec.replica} serves after {time.monotonic() - began:.1f} s")
        await self._end([child])

    async def at_once(self, services: Sequence[str]) -> None:
        """Ends all replicas of these services, each with its drain, and starts them again under their names.

        Raises:
            LaunchError: One did not come up again; it is tried further.
        """
        old = self._replicas(services)
        names = ", ".join(child.spec.replica for child in old)
        await self._end(old)
        await self._say(f"starting {names}")
        new = [self._children.start(child.spec, None) for child in old]
        await self._children.wait_ready(new)
        await self._balanced(new)

    async def _end(self, children: Sequence[Child]) -> None:
        """Takes replicas out, and says now and then that they still finish what they have."""
        began = time.monotonic()
        names = ", ".join(child.spec.replica for child in children)
        await self._say(f"{names}: draining")
        ending = asyncio.gather(*(self._take_out(child) for child in children))
        try:
            while not (await asyncio.wait((ending,), timeout=NEWS_SECONDS))[0]:
                await self._say(f"{names}: still at work after {time.monotonic() - began:.0f} s")
            await ending
        finally:
            ending.cancel()
        await self._say(f"{names}: ended after {time.monotonic() - began:.1f} s")
