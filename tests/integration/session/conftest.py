"""Real parts for the session service's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.session.valkey import Valkey


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """A Valkey of this test's own."""
    server = Valkey()
    server.start()
    try:
        yield server
    finally:
        server.kill()
