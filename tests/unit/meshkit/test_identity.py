from uuid import UUID

import pytest

from meshkit.errors import PermissionDeniedError, UnauthenticatedError
from meshkit.identity import (
    ANONYMOUS,
    Identity,
    current_identity,
    require_mesh,
    require_tenant,
    use_identity,
)

TENANT = UUID("01890000-0000-7000-8000-000000000001")


def test_nobody_is_calling_outside_of_a_call() -> None:
    assert current_identity() == ANONYMOUS
    with pytest.raises(UnauthenticatedError) as tenant:
        require_tenant()
    assert tenant.value.reason == "API_KEY_MISSING"
    with pytest.raises(PermissionDeniedError) as mesh:
        require_mesh()
    assert mesh.value.reason == "MESH_ONLY"


def test_background_work_can_act_as_a_tenant() -> None:
    with use_identity(Identity(TENANT, mesh=True)) as identity:
        assert current_identity() is identity
        assert require_tenant() == TENANT
        require_mesh()
    assert current_identity() == ANONYMOUS
