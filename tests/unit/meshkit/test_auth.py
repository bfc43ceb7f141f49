from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import grpc
import pytest

from hermesh.session.v1 import session_internal_service_pb2 as pb
from meshkit.auth import CachingAuthenticator, MeshAuthenticator, hash_key
from meshkit.channel import open_channel
from meshkit.context import client_var
from meshkit.errors import HermeshError, InternalError, UnauthenticatedError, UnavailableError
from meshkit.identity import Identity, use_identity
from meshkit.settings import MeshSettings
from tests.unit.meshkit.support import TENANT, Servicer, serve


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Source:
    """Answers from a dictionary, when its gate is open."""

    def __init__(self, **keys: UUID) -> None:
        self.keys = keys
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.error: Exception | None = None

    async def authenticate(self, api_key: str) -> UUID:
        self.asked.append(api_key)
        self.entered.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if api_key not in self.keys:
            raise UnauthenticatedError("API_KEY_INVALID", "no")
        return self.keys[api_key]


def cached(source: Source, **more: int) -> tuple[CachingAuthenticator, Clock]:
    clock = Clock()
    return CachingAuthenticator(source, clock=clock, **more), clock


async def test_a_tenant_is_remembered_for_its_time() -> None:
    source = Source(k=TENANT)
    keys, clock = cached(source)
    assert [await keys.authenticate("k") for _ in range(3)] == [TENANT] * 3
    clock.now = 29.9
    await keys.authenticate("k")
    assert len(source.asked) == 1
    clock.now = 30.1
    await keys.authenticate("k")
    assert len(source.asked) == 2


async def test_a_refusal_is_remembered_for_less() -> None:
    source = Source()
    keys, clock = cached(source)
    for _ in range(3):
        with pytest.raises(UnauthenticatedError) as refused:
            await keys.authenticate("k")
        assert refused.value.reason == "API_KEY_INVALID"
    assert len(source.asked) == 1
    source.keys["k"] = TENANT
    clock.now = 5.1
    assert await keys.authenticate("k") == TENANT


async def test_a_lookup_that_failed_is_not_remembered() -> None:
    source = Source(k=TENANT)
    keys, _ = cached(source)
    source.error = UnavailableError(message="down")
    with pytest.raises(UnavailableError):
        await keys.authenticate("k")
    source.error = None
    assert await keys.authenticate("k") == TENANT


async def test_callers_at_once_share_one_lookup() -> None:
    source = Source(k=TENANT)
    source.gate.clear()
    keys, _ = cached(source)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(keys.authenticate("k")) for _ in range(20)]
        await source.entered.wait()
        source.gate.set()
    assert {task.result() for task in tasks} == {TENANT}
    assert len(source.asked) == 1


async def test_callers_at_once_share_one_failure() -> None:
    source = Source()
    source.gate.clear()
    source.error = UnavailableError(message="down")
    keys, _ = cached(source)
    tasks = [asyncio.ensure_future(keys.authenticate("k")) for _ in range(5)]
    await source.entered.wait()
    source.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, UnavailableError) for result in results)


async def test_a_leader_that_leaves_does_not_fail_its_followers() -> None:
    source = Source(k=TENANT)
    source.gate.clear()
    keys, _ = cached(source)
    leader = asyncio.ensure_future(keys.authenticate("k"))
    await source.entered.wait()
    follower = asyncio.ensure_future(keys.authenticate("k"))
    await asyncio.sleep(0)
    leader.cancel()
    source.gate.set()
    async with asyncio.timeout(5):
        assert await follower == TENANT
    assert leader.cancelled()


async def test_the_cache_is_bounded_and_holds_no_key() -> None:
    source = Source(**{f"k{i}": uuid4() for i in range(50)})
    keys, _ = cached(source, max_entries=10)
    for i in range(50):
        await keys.authenticate(f"k{i}")
    assert len(keys._good) == 10
    assert set(keys._good) == {hash_key(f"k{i}") for i in range(40, 50)}


@pytest.mark.parametrize("api_key", ["", "x" * 501])
async def test_impossible_keys_are_not_looked_up(api_key: str) -> None:
    source = Source()
    keys, _ = cached(source)
    with pytest.raises(UnauthenticatedError):
        await keys.authenticate(api_key)
    assert source.asked == []


async def test_keys_are_looked_up_through_the_mesh_without_a_tenant(
    settings: MeshSettings, servicer: Servicer
) -> None:
    metadata: list[dict[str, object]] = []

    async def unary(request: object, context: object) -> object:
        metadata.append(dict(context.invocation_metadata()))  # type: ignore[attr-defined]
        if request.api_key == "hm_1":  # type: ignore[attr-defined]
            return pb.AuthenticateResponse(tenant_id=str(TENANT))
        if request.api_key == "hm_odd":  # type: ignore[attr-defined]
            return pb.AuthenticateResponse(tenant_id="odd")
        raise UnauthenticatedError("API_KEY_INVALID", "no")

    servicer.unary = unary
    async with serve(settings, servicer) as server, open_channel(settings, server.address) as channel:
        keys = MeshAuthenticator(channel, settings)
        with use_identity(Identity(None, mesh=False)):
            assert await keys.authenticate("hm_1") == TENANT
            assert await keys.authenticate("hm_1") == TENANT
            with pytest.raises(UnauthenticatedError):
                await keys.authenticate("hm_2")
            with pytest.raises(InternalError):
                await keys.authenticate("hm_odd")
    assert len(metadata) == 3
    assert all("x-hermesh-tenant" not in seen for seen in metadata)


async def test_no_session_service_is_unavailable(settings: MeshSettings) -> None:
    async with open_channel(settings, "127.0.0.1:1") as channel:
        with pytest.raises(UnavailableError) as error:
            await MeshAuthenticator(channel, settings).authenticate("hm_1")
    assert error.value.reason == "SERVICE_UNAVAILABLE"
    assert "127.0.0.1" not in error.value.message


async def refused(keys: CachingAuthenticator, key: str) -> HermeshError:
    with pytest.raises(HermeshError) as caught:
        await keys.authenticate(key)
    return caught.value


@contextmanager
def client(address: str) -> Iterator[None]:
    token = client_var.set(address)
    try:
        yield
    finally:
        client_var.reset(token)


async def test_wrong_keys_never_push_a_right_one_out_of_the_cache() -> None:
    source = Source(good=TENANT)
    keys, _ = cached(source, max_entries=10, burst=1_000)
    await keys.authenticate("good")
    for number in range(100):
        assert (await refused(keys, f"wrong-{number}")).reason == "API_KEY_INVALID"
    asked = len(source.asked)
    assert await keys.authenticate("good") == TENANT
    assert len(source.asked) == asked
    # Wrong ones are remembered, too, the last ten of them.
    await refused(keys, "wrong-99")
    assert len(source.asked) == asked
    await refused(keys, "wrong-0")
    assert len(source.asked) == asked + 1


async def test_unknown_keys_of_one_address_are_looked_up_only_so_often() -> None:
    source = Source(good=TENANT, other=TENANT)
    keys, clock = cached(source, burst=10, rate=2)
    with client("203.0.113.7"):
        await keys.authenticate("good")
        reasons = [(await refused(keys, f"wrong-{number}")).reason for number in range(100)]
        assert reasons == ["API_KEY_INVALID"] * 10 + ["TOO_MANY_WRONG_KEYS"] * 90
        assert len(source.asked) == 11
        error = await refused(keys, "wrong-100")
        assert (error.code, error.retry_after_ms) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 500)
        # A key that was right here goes on working, also once it has to be looked up again.
        clock.now = 0.3
        assert await keys.authenticate("good") == TENANT
        clock.now = 31
        source.asked.clear()
        for number in range(100, 200):
            await refused(keys, f"wrong-{number}")
        assert await keys.authenticate("good") == TENANT
        assert source.asked == [f"wrong-{number}" for number in range(100, 110)] + ["good"]
    with client("203.0.113.8"):
        assert await keys.authenticate("other") == TENANT
        assert (await refused(keys, "wrong-1000")).reason == "API_KEY_INVALID"


async def test_right_keys_cost_an_address_nothing_however_many_come_at_once() -> None:
    names = [f"k{number}" for number in range(200)]
    source = Source(**dict.fromkeys(names, TENANT))
    keys, _ = cached(source, burst=5, rate=1)
    source.gate.clear()
    with client("203.0.113.7"):
        asking = [asyncio.ensure_future(keys.authenticate(name)) for name in names]
        await source.entered.wait()
        source.gate.set()
        assert await asyncio.gather(*asking) == [TENANT] * 200
        assert (await refused(keys, "wrong")).reason == "API_KEY_INVALID"


async def test_an_address_in_debt_waits_the_longer() -> None:
    source = Source()
    keys, _ = cached(source, burst=5, rate=1)
    source.gate.clear()
    with client("203.0.113.7"):
        asking = [asyncio.ensure_future(refused(keys, f"wrong-{number}")) for number in range(50)]
        await source.entered.wait()
        source.gate.set()
        await asyncio.gather(*asking)
        assert (await refused(keys, "another")).retry_after_ms == 46_000


async def test_more_lookups_at_once_than_there_are_places_for_are_refused() -> None:
    source = Source()
    keys, _ = cached(source, max_lookups=3, burst=100)
    source.gate.clear()
    asking = [asyncio.ensure_future(refused(keys, f"wrong-{number}")) for number in range(3)]
    async with asyncio.timeout(5):
        while len(source.asked) < 3:  # noqa: ASYNC110 -- the source tells only of the first
            await asyncio.sleep(0)
    error = await refused(keys, "one-more")
    assert (type(error), error.retry_after_ms) == (UnavailableError, 500)
    source.gate.set()
    assert {error.reason for error in await asyncio.gather(*asking)} == {"API_KEY_INVALID"}


async def test_a_lookup_that_failed_is_not_held_against_its_address() -> None:
    source = Source(good=TENANT)
    keys, _ = cached(source, burst=1, rate=0.001)
    source.error = UnavailableError(message="down")
    for _ in range(20):
        assert type(await refused(keys, "good")) is UnavailableError
    source.error = None
    assert await keys.authenticate("good") == TENANT


async def test_a_key_that_was_revoked_is_wrong_from_then_on() -> None:
    source = Source(k=TENANT)
    keys, clock = cached(source)
    await keys.authenticate("k")
    del source.keys["k"]
    clock.now = 31
    assert [(await refused(keys, "k")).reason for _ in range(3)] == ["API_KEY_INVALID"] * 3
    assert len(source.asked) == 2
