"""A tenant's settings: what a request that does not say gets, and what a claim hands on."""

from __future__ import annotations

import pytest

from meshkit.errors import FailedPreconditionError
from meshkit.ids import uuid7
from services.session.domain import AppendOutcome, ConcurrencyPolicy, RunStatus, TenantChange
from tests.integration.session.store.kit import Kit, event, ref


async def name_of(kit: Kit) -> str:
    name: str = await kit.pool.fetchval("SELECT name FROM session.tenant WHERE tenant_id = $1", kit.tenant)
    return name


async def settle(
    kit: Kit,
    concurrency: ConcurrencyPolicy | None = None,
    approval_tools: list[str] | None = None,
    run_timeout_ms: int | None = None,
) -> None:
    change = TenantChange(concurrency, approval_tools, run_timeout_ms)
    assert await kit.store.set_tenant(await name_of(kit), change) is not None


async def test_a_new_tenant_enqueues_approves_nothing_and_has_no_limit_of_its_own(kit: Kit) -> None:
    tenant = await kit.store.get_tenant(await name_of(kit))
    assert tenant is not None
    assert tenant.tenant_id == kit.tenant
    assert tenant.concurrency is ConcurrencyPolicy.ENQUEUE
    assert (list(tenant.approval_tools), tenant.run_timeout_ms) == ([], None)


async def test_only_what_is_given_changes(kit: Kit) -> None:
    name = await name_of(kit)
    await settle(kit, ConcurrencyPolicy.ROLLBACK, ["pay", "*"], 5_000)
    assert await kit.store.set_tenant(name, TenantChange()) == await kit.store.get_tenant(name)
    await settle(kit, run_timeout_ms=0)
    tenant = await kit.store.get_tenant(name)
    assert tenant is not None
    assert tenant.concurrency is ConcurrencyPolicy.ROLLBACK
    assert (list(tenant.approval_tools), tenant.run_timeout_ms) == (["pay", "*"], None)
    await settle(kit, approval_tools=[])
    tenant = await kit.store.get_tenant(name)
    assert tenant is not None
    assert list(tenant.approval_tools) == []


async def test_a_name_of_nobody_is_none(kit: Kit) -> None:
    assert await kit.store.get_tenant("nobody") is None
    assert await kit.store.set_tenant("nobody", TenantChange(run_timeout_ms=1)) is None


async def test_a_request_that_does_not_say_gets_the_tenants_policy(kit: Kit) -> None:
    first = await kit.started("a", "first")
    await settle(kit, ConcurrencyPolicy.REJECT)
    with pytest.raises(FailedPreconditionError) as caught:
        await kit.submit(first.session_id)
    assert caught.value.reason == "SESSION_BUSY"
    # Its own word counts more.
    queued = await kit.submit(first.session_id, policy=ConcurrencyPolicy.ENQUEUE)
    await settle(kit, ConcurrencyPolicy.ROLLBACK)
    await kit.submit(first.session_id, "instead")
    assert (await kit.store.get_run(kit.tenant, queued.run.run_id)).status is RunStatus.CANCELLED
    assert (await kit.store.renew([ref(first)])).cancelled == [first.run_id]
    await kit.step(first, 2, event("run.cancelled", "{}"), status=RunStatus.CANCELLED)
    assert await kit.messages(first.session_id) == []


async def test_another_tenants_policy_is_not_ours(kit: Kit) -> None:
    other = Kit(kit.store, await kit.store.ensure_key(f"o-{uuid7()}", uuid7().hex * 2, "k"), kit.pool)
    await settle(other, ConcurrencyPolicy.REJECT, ["*"], 1)
    grant = await kit.started()
    assert not (await kit.submit(grant.session_id)).duplicate
    assert grant.time_left_ms > 1_000


async def test_a_repeated_request_gets_its_run_whatever_became_of_the_default(kit: Kit) -> None:
    first = await kit.started()
    request_id = str(uuid7())
    queued = await kit.submit(first.session_id, request_id=request_id)
    await settle(kit, ConcurrencyPolicy.REJECT)
    again = await kit.submit(first.session_id, request_id=request_id)
    await settle(kit, ConcurrencyPolicy.INTERRUPT)
    and_again = await kit.submit(first.session_id, request_id=request_id)
    assert (again.duplicate, and_again.duplicate) == (True, True)
    assert again.run.run_id == and_again.run.run_id == queued.run.run_id
    # A repeat interrupts nobody, itself the least.
    assert (await kit.store.renew([ref(first)])).cancelled == []
    assert again.run.status is RunStatus.QUEUED


async def test_a_run_gets_its_own_limit_else_its_tenants_else_the_services(kit: Kit) -> None:
    async def limit(timeout_ms: int = 0) -> int:
        session = await kit.session()
        submitted = await kit.submit(session.session_id, timeout_ms=timeout_ms)
        return await kit.time_left(submitted.run.run_id)

    assert await limit() == 600_000
    await settle(kit, run_timeout_ms=5_000)
    assert await limit() == 5_000
    assert await limit(7_000) == 7_000


@pytest.mark.parametrize("history", [True, False])
async def test_a_claim_names_the_tools_that_need_approval_now(kit: Kit, history: bool) -> None:
    submitted = await kit.submit((await kit.session()).session_id)
    await settle(kit, approval_tools=["pay", "refund"])
    claim = await kit.store.claim(submitted.run.run_id, "a", history=history)
    assert claim.context is not None
    assert list(claim.context.approval_tools) == ["pay", "refund"]
    assert claim.grant is not None
    assert (await kit.append(claim.grant, 2)).outcome is AppendOutcome.COMMITTED
