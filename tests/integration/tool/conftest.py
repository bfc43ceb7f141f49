"""A real session service, for what the journal promises."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.integration.session.process import KEY, SessionProcess, environment, run_command


@pytest.fixture(scope="module")
def session_process(database: str) -> Iterator[SessionProcess]:
    """A session replica on PostgreSQL, with the tenant of `KEY`."""
    values = environment(database)
    done = run_command("bootstrap", "--api-key-env", "HERMESH_API_KEY", **values, HERMESH_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    process = SessionProcess("session-1", values)
    try:
        process.wait_ready()
        yield process
    finally:
        process.kill()
        shutil.rmtree(process.folder, ignore_errors=True)
