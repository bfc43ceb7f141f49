"""One whole mesh for all end-to-end tests, on the scripted model; tests that break it leave it healthy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.mesh import Mesh


@pytest.fixture(scope="session")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every process of the mesh writes its finished spans."""
    return tmp_path_factory.mktemp("traces") / "spans.jsonl"


@pytest.fixture(scope="session")
def shared_mesh(trace_file: Path) -> Iterator[Mesh]:
    settings = {
        "HERMESH_TRACE_FILE": str(trace_file),
        "HERMESH_LLM_FIRST_BYTE_TIMEOUT": "2",
        "HERMESH_LLM_IDLE_TIMEOUT": "5",
    }
    with Mesh(replicas="gateway=2,agent=2,session=2,tool=1,memory=1", settings=settings) as mesh:
        yield mesh
        found = tracebacks(mesh)
        assert not found, "the mesh logged what nobody expected:\n" + "\n".join(found)


def tracebacks(mesh: Mesh) -> list[str]:
    """What the mesh's processes logged with a stack: a bug, whatever the tests did to them.

    Warnings do not count: asyncpg adds a stack to its own when PostgreSQL is gone.
    """
    return [
        f"{log.name}: {line[:4000]}"
        for log in sorted((mesh.data_dir / "logs").glob("*.log"))
        for line in log.read_text(errors="replace").splitlines()
        if "Traceback" in line and '"level":"warning"' not in line
    ]


@pytest.fixture
def mesh(shared_mesh: Mesh) -> Mesh:
    """The shared mesh, healthy: what an earlier test broke has come back."""
    shared_mesh.wait_healthy()
    return shared_mesh


@pytest.fixture(scope="session")
def other_key(shared_mesh: Mesh) -> str:
    """The API key of another tenant."""
    return shared_mesh.new_tenant("other")
