"""What a person at a shell relies on: settings that last, a supervisor that is replaced, an honest Ctrl-C."""

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from bench.mesh import HERMESH, Mesh, wait_until
from tests.e2e.client import http, new_session, run_to_end

SECONDS = 60


def fresh_shell(mesh: Mesh, **more: str) -> dict[str, str]:
    """The environment of a shell that knows nothing but where the data folder is."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HERMESH_")}
    return outside | {"HERMESH_DATA_DIR": str(mesh.data_dir)} | more


def hermesh(environment: dict[str, str], *arguments: str, seconds: float = SECONDS) -> str:
    done = subprocess.run(
        [str(HERMESH), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    key = tmp_path_factory.mktemp("secrets") / "model-key"
    key.write_text("sk-from-a-file\n")
    settings = {"HERMESH_MAX_TURNS": "7", "HERMESH_LLM_API_KEY_FILE": str(key)}
    with Mesh(settings=settings, replicas="agent=1,session=1") as mesh:
        yield mesh


def test_down_and_up_from_a_fresh_shell_is_the_same_mesh(kept: Mesh) -> None:
    shell = fresh_shell(kept)
    assert "heliotrope" in hermesh(shell, "run", "[[echo]] heliotrope")
    before = hermesh(shell, "env")
    assert "HERMESH_MAX_TURNS=7" in before
    # A secret in a file is printed as what it is: both together would be refused.
    assert "HERMESH_LLM_API_KEY=sk-from-a-file" in before
    assert "HERMESH_LLM_API_KEY_FILE" not in before
    assert f"HERMESH_HTTP_URL={kept.url}" in before
    assert hermesh(shell, "down").startswith("0")
    said = hermesh(shell, "up", "--no-reply", seconds=120)
    assert said.startswith("0"), said
    assert "HERMESH_MAX_TURNS=7" in said
    assert hermesh(shell, "env") == before
    assert "heliotrope" in hermesh(shell, "sessions")
    status = hermesh(shell, "status")
    assert "HERMESH_MAX_TURNS=7" in status
    # The same settings, said or kept, are no others.
    assert "not those" not in kept.command("up", "--no-reply")
    assert "(HERMESH_MAX_TURNS)" in hermesh(fresh_shell(kept, HERMESH_MAX_TURNS="8"), "up", "--no-reply")


def test_up_on_another_database_is_refused_and_nothing_is_lost(kept: Mesh) -> None:
    shell = fresh_shell(kept)
    hermesh(shell, "run", "[[echo]] amaranth")
    elsewhere = fresh_shell(kept, HERMESH_DATABASE_URL="postgresql://a:secret@127.0.0.1:1/x")
    hermesh(shell, "down")
    said = hermesh(elsewhere, "up", "--no-reply")
    assert said.startswith("1")
    assert "embedded" in said
    assert "--yes" in said
    assert "secret" not in said
    # It was told to all the same, and nobody is there: what worked before stays what is kept.
    assert "does not answer" in hermesh(elsewhere, "up", "--no-reply", "--yes")
    assert hermesh(shell, "up", "--no-reply", seconds=120).startswith("0")
    assert "amaranth" in hermesh(shell, "sessions")


async def test_no_client_sees_an_error_while_a_killed_supervisor_is_replaced(mesh: Mesh) -> None:
    """Not one refused request, and no process of the services is another one afterwards."""
    before = {row.replica: row.pid for row in await asyncio.to_thread(mesh.status)}
    over = asyncio.Event()
    counts = {"reads": 0, "runs": 0}

    async def read() -> None:
        async with http(mesh) as client:
            while not over.is_set():
                answer = await client.get("/v1/sessions?page_size=1")
                assert answer.status_code == 200, answer.text
                counts["reads"] += 1

    async def chat() -> None:
        async with http(mesh) as client:
            session = await new_session(client)
            while not over.is_set():
                frames = await run_to_end(client, session, "[[tokens=5 rate=200]]")
                assert frames[-1].event == "run.completed"
                counts["runs"] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(read())
            group.create_task(chat())
        for _ in range(2):
            state = json.loads((mesh.data_dir / "state.json").read_text())
            os.kill(state["supervisor"]["pid"], signal.SIGKILL)
            await asyncio.to_thread(mesh.command, "up", "--no-reply", seconds=120)
        over.set()
    assert min(counts.values()) > 0
    assert {row.replica: row.pid for row in await asyncio.to_thread(mesh.status)} == before


def interrupted(mesh: Mesh, *arguments: str) -> tuple[int, str, str]:
    """Runs a command until the reply has begun, presses Ctrl-C, and returns its status and what it said."""
    process = subprocess.Popen(
        [str(HERMESH), *arguments],
        env=mesh.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    begun = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, (begun + out).decode(), err.decode()


def test_ctrl_c_in_a_run_says_that_the_run_goes_on(mesh: Mesh) -> None:
    status, _, said = interrupted(mesh, "run", "[[tokens=2000 rate=20]]")
    assert status == 130
    assert "Traceback" not in said
    found = re.search(r"the run goes on.*hermesh watch (\S+?)\..*hermesh cancel (\S+)", said)
    assert found, said
    assert found[1] == found[2]
    assert "asked to stop" in mesh.command("cancel", found[1])
    assert "cancelled" in mesh.command("watch", found[1])
    assert "is cancelled" in mesh.command("cancel", found[1])


def test_ctrl_c_in_a_run_stops_it_where_that_is_asked_for(mesh: Mesh) -> None:
    status, out, said = interrupted(mesh, "run", "--json", "--stop", "[[tokens=2000 rate=20]]")
    assert status == 130
    assert "stopped" in said
    run = json.loads(out.splitlines()[0])["run_id"]
    wait_until(lambda: "is cancelled" in mesh.command("cancel", run), 30, "the run's end")
