"""Tenants and API keys in PostgreSQL."""

from __future__ import annotations

from uuid import UUID

from meshkit.errors import StartupError
from meshkit.ids import uuid7
from meshkit.postgres import load_sql, tenant_elsewhere
from services.session.domain import Tenant, TenantChange
from services.session.store.postgres_base import PostgresPart
from services.session.store.rows import tenant_of

_SQL = load_sql("services.session.store.sql", "tenants.sql")
_UPKEEP = load_sql("services.session.store.sql", "upkeep.sql")


class PostgresTenants(PostgresPart):
    """See `port.Tenants`."""

    async def tenant_of_key(self, key_hash: str) -> UUID | None:
        """See the port."""
        row = await self._fetchrow(_SQL["tenant_of_key"], key_hash)
        if row is None:
            return None
        if row["moved"]:
            raise tenant_elsewhere("TENANT_MOVED")
        tenant_id: UUID = row["tenant_id"]
        return tenant_id

    async def moved_tenants(self) -> frozenset[UUID]:
        """See the port."""
        return frozenset(row["tenant_id"] for row in await self._fetch(_UPKEEP["moved_tenants"]))

    async def ensure_key(self, tenant_name: str, key_hash: str, key_name: str) -> UUID:
        """See the port.

        Raises:
            StartupError: The key is another tenant's, or was revoked.
        """
        async with self._connection({}) as connection, connection.transaction():
            tenant_id: UUID = await connection.fetchval(
                self._here(_SQL["ensure_tenant"]), uuid7(), tenant_name
            )
            row = await connection.fetchrow(self._here(_SQL["ensure_key"]), key_hash, tenant_id, key_name)
        if row is not None and row["tenant_id"] != tenant_id:
            raise StartupError(
                f"the API key belongs to another tenant than {tenant_name}: choose another key"
            )
        if row is not None and row["revoked"]:
            raise StartupError("the API key was revoked: choose another key")
        return tenant_id

    async def get_tenant(self, name: str) -> Tenant | None:
        """See the port."""
        row = await self._fetchrow(_SQL["get_tenant"], name)
        return None if row is None else tenant_of(row)

    async def set_tenant(self, name: str, change: TenantChange) -> Tenant | None:
        """See the port."""
        row = await self._fetchrow(
            _SQL["set_tenant"],
            name,
            None if change.concurrency is None else int(change.concurrency),
            None if change.approval_tools is None else list(change.approval_tools),
            change.run_timeout_ms,
        )
        return None if row is None else tenant_of(row)
