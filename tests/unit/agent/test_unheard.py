"""Leases that were granted by calls whose answer never came."""

import asyncio

import pytest

from meshkit.errors import UnavailableError
from meshkit.tasks import TaskOwner
from services.agent.runs import unheard as module
from services.agent.runs.unheard import Unheard


class FakeLeases:
    """A fake session service that knows who has which lease."""

    def __init__(self):
        self.held: dict[str, int] = {}
        self.released: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.looks = 0
        self.away = 0

    async def leases(self):
        self.looks += 1
        if self.away:
            self.away -= 1
            raise UnavailableError()
        return [("session", run_id, fence) for run_id, fence in self.held.items()]

    async def release(self, session_id, run_id, fence, *, earlier=True):
        if self.held[run_id] != fence and not (earlier and self.held[run_id] > fence):
            return False
        del self.held[run_id]
        self.released.put_nowait((run_id, fence))
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "SETTLED_SECONDS", 0.05)


def made(worked_on=()):
    port = FakeLeases()
    return port, Unheard(port, set(worked_on).__contains__, asyncio.get_running_loop().time)


async def test_a_lease_that_nobody_here_heard_of_is_given_up_and_others_are_kept():
    port, unheard = made(["ours"])
    port.held = {"ours": 3, "unheard": 7}
    async with TaskOwner() as tasks, asyncio.timeout(5):
        tasks.start(unheard.run(), name="unheard")
        with pytest.raises(UnavailableError), unheard.asking():
            raise UnavailableError()
        assert await port.released.get() == ("unheard", 7)
    assert port.held == {"ours": 3}


async def test_a_store_that_is_away_is_looked_at_again_and_once_all_is_settled_no_more():
    port, unheard = made()
    port.away = 5
    async with TaskOwner() as tasks, asyncio.timeout(5):
        tasks.start(unheard.run(), name="unheard")
        unheard.missed()
        while unheard._wake.is_set():  # noqa: ASYNC110 - nothing tells that it is done
            await asyncio.sleep(0.01)
        looks = port.looks
        assert looks > 5
        await asyncio.sleep(0.05)
        assert port.looks == looks


async def test_what_a_call_under_way_may_still_bring_is_waited_for():
    port, unheard = made()
    port.held = {"coming": 1}
    seen: dict[str, float] = {}
    with unheard.asking():
        await unheard.look(seen)
        await unheard.look(seen)
        assert port.held
    with unheard.asking():
        # Begun since: it brings another one.
        await unheard.look(seen)
    assert not port.held


async def test_a_lease_that_was_claimed_anew_since_the_look_is_kept():
    port, unheard = made()
    port.held = {"run": 6}
    looked = port.leases

    async def leases():
        found = await looked()
        # Claimed here by a call whose answer is on its way.
        port.held["run"] = 7
        return found

    port.leases = leases
    await unheard.look({})
    assert port.held == {"run": 7}
