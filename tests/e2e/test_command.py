"""The command `hermesh` with everything embedded, the real language model among it."""

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.mesh import HERMESH, Mesh, MeshError, free_ports, wait_until


@pytest.fixture(scope="module")
def embedded() -> Iterator[Mesh]:
    with Mesh(scripted_model=False) as mesh:
        yield mesh


def test_status_lists_every_part_and_all_are_healthy(embedded: Mesh) -> None:
    rows = embedded.status()
    counts = {
        service: sum(row.service == service for row in rows) for service in {row.service for row in rows}
    }
    assert counts.pop("gateway") >= 1
    assert counts.pop("agent") >= 2
    assert counts.pop("session") >= 2
    assert counts == {"tool": 1, "memory": 1, "envoy": 1, "postgresql": 1, "valkey": 1, "model": 1}
    assert {row.health for row in rows} == {"healthy"}
    assert all(row.pid > 0 and row.address for row in rows)
    for row in rows:
        os.kill(row.pid, 0)


def test_no_part_interrupts_another(embedded: Mesh) -> None:
    policies = {row.replica: os.sched_getscheduler(row.pid) for row in embedded.status() if row.pid}
    assert policies == dict.fromkeys(policies, os.SCHED_BATCH)
    assert {"postgresql-1", "envoy-1", "gateway-1", "agent-1"} <= policies.keys()


def test_a_question_gets_a_correct_answer_from_the_real_model(embedded: Mesh) -> None:
    printed = embedded.command("run", "--json", "What is the capital of France?")
    events = [json.loads(line) for line in printed.splitlines()]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "run.completed"
    text = "".join(event["data"]["text"] for event in events if event["type"] == "text.delta")
    assert "Paris" in text
    assert sum(event["type"] == "text.delta" for event in events) > 2
    assert "Paris" in embedded.command("run", "What is the capital of France?")
    assert "capital of France" in embedded.command("sessions")


def test_the_embedded_model_calls_a_tool_that_the_caller_chose(embedded: Mesh) -> None:
    import httpx

    with httpx.Client(base_url=embedded.url, headers=embedded.headers, timeout=60) as client:
        session = client.post("/v1/sessions", json={}).json()["session_id"]
        body = {
            "input": "What is 6 * 7? Use the calculator.",
            "stream": True,
            "options": {"tools": ["calculator"], "tool_choice": "calculator"},
        }
        answer = client.post(f"/v1/sessions/{session}/runs", json=body)
        assert "event: tool.call" in answer.text
        assert "event: tool.result" in answer.text
        assert "event: run.completed" in answer.text


def test_the_key_is_for_its_owner_only(embedded: Mesh) -> None:
    for name in ("api-key",):
        assert stat.S_IMODE((embedded.data_dir / name).stat().st_mode) == 0o600


def test_up_again_is_harmless(embedded: Mesh) -> None:
    before = {row.replica: row.pid for row in embedded.status()}
    embedded.command("up", "--no-reply")
    assert {row.replica: row.pid for row in embedded.status()} == before


def test_scale_adds_and_removes_without_a_restart(embedded: Mesh) -> None:
    before = {row.replica: row.pid for row in embedded.status()}
    embedded.command("scale", "agent=3")
    embedded.wait_healthy()
    assert len(embedded.of("agent")) == 3
    embedded.command("scale", "agent=2")
    wait_until(lambda: len(embedded.of("agent")) == 2, 30, "two agents")
    assert before.items() <= {row.replica: row.pid for row in embedded.status()}.items()


@pytest.mark.parametrize("service", ["model", "valkey", "envoy", "memory", "tool"])
def test_a_part_that_dies_is_started_again_and_status_says_so(embedded: Mesh, service: str) -> None:
    before = embedded.of(service)[0]
    os.kill(before.pid, signal.SIGKILL)
    wait_until(lambda: embedded.of(service)[0].restarts == before.restarts + 1, 30, f"a new {service}")
    embedded.wait_healthy()
    assert "Paris" in embedded.command("run", "What is the capital of France?")


def test_a_killed_supervisor_leaves_children_that_up_takes_over(embedded: Mesh) -> None:
    before = {row.replica: row.pid for row in embedded.status()}
    state = json.loads((embedded.data_dir / "state.json").read_text())
    os.kill(state["supervisor"]["pid"], signal.SIGKILL)
    embedded.command("up", "--no-reply", seconds=120)
    embedded.wait_healthy()
    after = {row.replica: row.pid for row in embedded.status()}
    for replica, pid in before.items():
        if after.get(replica) != pid:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    assert "Paris" in embedded.command("run", "What is the capital of France?")


def test_logs_show_a_service(embedded: Mesh) -> None:
    lines = embedded.command("logs", "agent").splitlines()
    assert any('"event"' in line for line in lines)


def test_doctor_finds_nothing_wrong(embedded: Mesh) -> None:
    said = embedded.command("doctor")
    for looked_at in ("PostgreSQL's clock", "Redis takes writes", "Envoy's view of agent"):
        assert looked_at in said


def test_down_leaves_no_process_and_up_comes_back_with_the_data() -> None:
    with Mesh(scripted_model=False) as mesh:
        mesh.command("run", "Remember the word heliotrope.")
        pids = [row.pid for row in mesh.status()]
        mesh.command("down")
        for pid in pids:
            assert not Path(f"/proc/{pid}").exists()
        mesh.command("down")
        mesh.command("up", "--no-reply", seconds=120)
        assert "heliotrope" in mesh.command("sessions")


def fails(environment: dict[str, str]) -> str:
    """Runs `hermesh up`, which must fail, and returns the one line that it says."""
    done = subprocess.run(
        [str(HERMESH), "up", "--no-reply"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr.strip()


def environment(folder: Path) -> dict[str, str]:
    http_port, grpc_port = free_ports(2)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HERMESH_")}
    return outside | {
        "HERMESH_DATA_DIR": str(folder),
        "HERMESH_HTTP_PORT": str(http_port),
        "HERMESH_GRPC_PORT": str(grpc_port),
    }


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    taken = environment(tmp_path / "data")
    with socket.create_server(("127.0.0.1", int(taken["HERMESH_HTTP_PORT"]))):
        said = fails(taken)
    assert taken["HERMESH_HTTP_PORT"] in said
    assert "HERMESH_HTTP_PORT" in said


def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    assert str(tmp_path / "data") in fails(environment(tmp_path / "data"))


def test_a_database_of_another_version_is_named(tmp_path: Path) -> None:
    with Mesh(scripted_model=False) as mesh:
        mesh.command("down")
        version = next(mesh.data_dir.rglob("PG_VERSION"))
        version.write_text("9\n")
        with pytest.raises(MeshError) as failed:
            mesh.command("up", "--no-reply")
        assert "Traceback" not in str(failed.value)
        assert "PostgreSQL" in str(failed.value)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    # A file system of its own in a mount namespace of its own, so that it works as any user.
    script = f"mount -t tmpfs -o size=24m tmpfs {tmp_path} && exec {HERMESH} up --no-reply"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env=environment(tmp_path / "data"),
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "space" in done.stderr
    assert "HERMESH_DATA_DIR" in done.stderr
