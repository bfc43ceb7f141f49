"""A tenant's settings, as an operator changes and reads them."""

import re

from meshkit.errors import StartupError
from services.session.domain import ConcurrencyPolicy, Tenant, TenantChange
from services.session.operations.submit import MAX_RUN_TIMEOUT_MS
from services.session.store.port import Tenants

POLICIES = tuple(policy.name.lower() for policy in ConcurrencyPolicy if policy)
_TOOL = re.compile(r"[A-Za-z0-9_-]{1,200}|\*")


def change_of(
    concurrency: str | None, require_approval: str | None, run_timeout: float | None
) -> TenantChange:
    """Returns what to change, from the words of a command; None leaves a setting as it is.

    Args:
        concurrency: One of `POLICIES`.
        require_approval: Names of tools, separated by commas, or `*`; an empty text means none.
        run_timeout: Seconds; 0 takes the tenant's own limit away.

    Raises:
        StartupError: One of them is not what it should be.
    """
    tools = None
    if require_approval is not None:
        tools = sorted({name.strip() for name in require_approval.split(",") if name.strip()})
        wrong = [name for name in tools if _TOOL.fullmatch(name) is None]
        if wrong:
            raise StartupError(f"this is no tool's name: {wrong[0][:100]!r}")
    if run_timeout is not None and not 0 <= run_timeout <= MAX_RUN_TIMEOUT_MS / 1000:
        raise StartupError(f"a run's time limit is 0 to {MAX_RUN_TIMEOUT_MS // 1000} seconds")
    return TenantChange(
        concurrency=None if concurrency is None else ConcurrencyPolicy[concurrency.upper()],
        approval_tools=tools,
        run_timeout_ms=None if run_timeout is None else max(1, round(run_timeout * 1000)) * (run_timeout > 0),
    )


async def configure(store: Tenants, name: str, change: TenantChange) -> Tenant:
    """Changes a tenant's settings; returns the tenant as it is then.

    Args:
        store: Where they are kept.
        name: The tenant's name.
        change: What to change; nothing is fine.

    Raises:
        StartupError: No tenant has this name.
    """
    found = await (store.get_tenant(name) if change == TenantChange() else store.set_tenant(name, change))
    if found is None:
        raise StartupError(f"there is no tenant {name[:100]!r}; bootstrap makes one")
    return found


def describe(tenant: Tenant) -> str:
    """Returns a tenant and its settings as lines for a person."""
    limit = tenant.run_timeout_ms
    rows = {
        "tenant": tenant.name,
        "id": str(tenant.tenant_id),
        "concurrency": tenant.concurrency.name.lower(),
        "require approval": ", ".join(tenant.approval_tools) or "none",
        "run timeout": "the service's own" if limit is None else f"{limit / 1000:g} s",
    }
    return "".join(f"{name:<18}{value}\n" for name, value in rows.items())
