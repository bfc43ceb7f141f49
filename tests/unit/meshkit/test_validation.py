import pytest

from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_service_pb2 as public
from meshkit.errors import InvalidArgumentError
from meshkit.validation import validate

ID = "01890000-0000-7000-8000-000000000001"


def test_a_valid_request_passes() -> None:
    validate(internal.ClaimRunRequest(run_id=ID, owner="agent-1"))


def test_paths_name_items_and_keys() -> None:
    leases = internal.RenewLeasesRequest(owner="o", leases=[internal.LeaseRef(session_id=ID, run_id="x")])
    with pytest.raises(InvalidArgumentError) as error:
        validate(leases)
    assert [violation.field for violation in error.value.violations] == ["leases[0].run_id"]
    assert error.value.message.startswith("leases[0].run_id: ")
    with pytest.raises(InvalidArgumentError) as error:
        validate(public.CreateSessionRequest(metadata={"k": "v" * 10_000}))
    assert error.value.violations[0].field == 'metadata["k"]'
    assert error.value.violations[0].description
