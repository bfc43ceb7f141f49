"""Session replicas as processes of their own, and clients of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_internal_service_pb2_grpc as internal_grpc
from hermesh.session.v1 import session_service_pb2 as public
from hermesh.session.v1 import session_service_pb2_grpc as public_grpc
from meshkit.channel import mesh_metadata, open_channel
from meshkit.settings import MeshSettings

KEY = "hm_" + "s" * 43
OTHER_KEY = "hm_" + "o" * 43
MESH_TOKEN = "mesh-secret"


def environment(database: str, redis_url: str = "", **more: str) -> dict[str, str]:
    """The environment of a session process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HERMESH_")}
    return (
        inherited
        | {
            "HERMESH_DATABASE_URL": database,
            "HERMESH_REDIS_URL": redis_url,
            "HERMESH_MESH_TOKEN": MESH_TOKEN,
            "HERMESH_LOG_LEVEL": "warning",
            "HERMESH_DRAIN_DELAY_SECONDS": "0.2",
            "HERMESH_DRAIN_SECONDS": "5",
        }
        | more
    )


def run_command(*arguments: str, **values: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m services.session ...` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "services.session", *arguments],
        env=values,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )


class SessionProcess:
    """One replica."""

    def __init__(self, name: str, values: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hm-session-"))
        self.ready = self.folder / "ready.json"
        self.log = self.folder / "log"
        values = values | {"HERMESH_READY_FILE": str(self.ready), "HERMESH_REPLICA": name}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.session"], env=values, stdout=log, stderr=log, cwd="/"
            )
        self.address = ""
        self.metrics_address = ""

    def wait_ready(self) -> None:
        end = time.monotonic() + 90
        while not self.ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, "the replica does not become ready"
            time.sleep(0.02)
        record = json.loads(self.ready.read_text())
        self.address = record["address"]
        self.metrics_address = record["metrics_address"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)

    def stop(self) -> int:
        """Ends it as an operator does; returns its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


class Client:
    """Talks to one replica as a tenant and as the mesh."""

    def __init__(self, outside: Any, inside: Any, key: str) -> None:
        self.key = key
        self.tenant_id = ""
        self.metadata = (("authorization", f"Bearer {key}"),)
        self.public: public_grpc.SessionServiceAsyncStub = public_grpc.SessionServiceStub(outside)
        self.mesh: internal_grpc.SessionInternalServiceAsyncStub = internal_grpc.SessionInternalServiceStub(
            inside
        )

    async def mesh_submit(self, session_id: str) -> public.SubmitRunResponse:
        """Submits as an agent does: on a tenant's behalf, and with the lease."""
        settings = MeshSettings(mesh_token=SecretStr(MESH_TOKEN))
        if not self.tenant_id:
            answer = await self.mesh.Authenticate(internal.AuthenticateRequest(api_key=self.key))
            self.tenant_id = answer.tenant_id
        request = public.SubmitRunRequest(
            session_id=session_id,
            input=[InputMessage(role="user", content="hi")],
            claim_owner="agent-1",
        )
        return await self.public.SubmitRun(request, metadata=mesh_metadata(settings, self.tenant_id))


@asynccontextmanager
async def connect(replica: SessionProcess, key: str = KEY) -> AsyncIterator[Client]:
    settings = MeshSettings(mesh_token=SecretStr(MESH_TOKEN))
    async with (
        open_channel(settings, replica.address, mesh=False) as outside,
        open_channel(settings, replica.address) as inside,
    ):
        yield Client(outside, inside, key)


def metric(replica: SessionProcess, name: str) -> float:
    """The sum of a metric's samples on a replica; with labels in `name`, the sample of just these."""
    import urllib.request

    with urllib.request.urlopen(f"http://{replica.metrics_address}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return sum(float(value) for labelled, value in samples if name in (labelled, labelled.split("{")[0]))
