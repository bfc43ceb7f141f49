"""Two replicas on one database and one Valkey."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ValkeyServer
from tests.integration.session.process import (
    KEY,
    OTHER_KEY,
    Client,
    SessionProcess,
    connect,
    environment,
    run_command,
)


def bootstrap(database: str) -> None:
    """Makes the default tenant with its key."""
    values = environment(database, HERMESH_API_KEY=KEY)
    done = run_command("bootstrap", "--api-key-env", "HERMESH_API_KEY", **values)
    assert done.returncode == 0, done.stderr


@dataclass
class Pair:
    """Two replicas and what they share."""

    first: SessionProcess
    second: SessionProcess
    valkey: ValkeyServer
    database: str


@pytest.fixture(scope="module")
def module_valkey() -> Iterator[ValkeyServer]:
    folder = Path(tempfile.mkdtemp(prefix="hm-vk-"))
    server = ValkeyServer(folder)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pair(database: str, module_valkey: ValkeyServer) -> Iterator[Pair]:
    """Two replicas, for all tests of a module; a test that breaks one starts its own."""
    bootstrap(database)
    values = environment(database, module_valkey.url)
    replicas = [SessionProcess(name, values) for name in ("session-1", "session-2")]
    try:
        for replica in replicas:
            replica.wait_ready()
        yield Pair(replicas[0], replicas[1], module_valkey, database)
    finally:
        for replica in replicas:
            replica.kill()
            shutil.rmtree(replica.folder, ignore_errors=True)


@pytest.fixture
async def first(pair: Pair) -> AsyncIterator[Client]:
    """A client of the first replica."""
    async with connect(pair.first) as client:
        yield client


@pytest.fixture
async def second(pair: Pair) -> AsyncIterator[Client]:
    """A client of the second replica."""
    async with connect(pair.second) as client:
        yield client


__all__ = ["OTHER_KEY"]
