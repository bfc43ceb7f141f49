"""Who is calling: the tenant of the RPC being served, and whether the caller is a process of the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from uuid import UUID

from meshkit.errors import PermissionDeniedError, UnauthenticatedError

AUTHORIZATION_KEY = "authorization"
MESH_TOKEN_KEY = "x-hermesh-mesh"  # noqa: S105 -- the name of the key, not a secret
TENANT_KEY = "x-hermesh-tenant"
# No tenant has this id. A process of the mesh that calls on its behalf asks whether a service works, down to
# the database, and is told nothing of anybody's.
PROBE_TENANT = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Identity:
    """The caller of an RPC.

    Attributes:
        tenant_id: The tenant on whose behalf the call is made; None on mesh calls that carry none.
        mesh: True if the caller proved to be a process of this mesh.
    """

    tenant_id: UUID | None
    mesh: bool


ANONYMOUS = Identity(tenant_id=None, mesh=False)

identity_var: ContextVar[Identity] = ContextVar("hermesh_identity", default=ANONYMOUS)


def current_identity() -> Identity:
    """Returns the caller of the RPC being served; `ANONYMOUS` outside of one."""
    return identity_var.get()


@contextmanager
def use_identity(identity: Identity) -> Iterator[Identity]:
    """Acts as `identity` inside the block: for background work that no RPC stands behind."""
    token = identity_var.set(identity)
    try:
        yield identity
    finally:
        identity_var.reset(token)


def require_tenant() -> UUID:
    """Returns the caller's tenant.

    Raises:
        UnauthenticatedError: The call names no tenant.
    """
    tenant_id = identity_var.get().tenant_id
    if tenant_id is None:
        raise UnauthenticatedError(reason="API_KEY_MISSING", message="this call needs an API key")
    return tenant_id


def require_mesh() -> None:
    """Refuses callers from outside of the mesh.

    Raises:
        PermissionDeniedError: The caller is not a process of this mesh.
    """
    if not identity_var.get().mesh:
        raise PermissionDeniedError(reason="MESH_ONLY", message="this method is for the mesh's own services")
