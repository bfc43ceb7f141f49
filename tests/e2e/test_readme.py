"""The README's examples, run as they stand against a mesh: only addresses and the key's place differ."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.mesh import Mesh

ROOT = Path(__file__).resolve().parents[2]
TALK = (ROOT / "README.md").read_text().partition("## Talk to it")[2].partition("## Use a better model")[0]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def localized(text: str, mesh: Mesh) -> str:
    text = text.replace("127.0.0.1:8080", f"127.0.0.1:{mesh.http_port}")
    text = text.replace("127.0.0.1:50051", f"127.0.0.1:{mesh.grpc_port}")
    return text.replace(".hermesh/api-key", str(mesh.data_dir / "api-key"))


def run(mesh: Mesh, command: list[str], script: str) -> str:
    done = subprocess.run(
        command,
        input=localized(script, mesh),
        cwd=ROOT,
        env=mesh.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def blocks() -> list[tuple[str, str]]:
    found = BLOCK.findall(TALK)
    assert len(found) >= 6
    return found


def test_the_shell_examples_work(mesh: Mesh, blocks: list[tuple[str, str]]) -> None:
    # One shell for all of them, in their order: later ones use what earlier ones set. `chat` wants a
    # terminal and a person; its own tests drive it.
    script = "\n".join(text for kind, text in blocks if kind == "sh")
    script = "\n".join(line for line in script.splitlines() if "hermesh chat" not in line)
    printed = run(mesh, ["bash", "-eu", "-o", "pipefail"], script)
    assert printed.count("event: run.completed") == 2
    assert "hermesh.session.v1.SessionService" in printed


def test_the_python_examples_work(mesh: Mesh, blocks: list[tuple[str, str]]) -> None:
    for text in (text for kind, text in blocks if kind == "python"):
        assert run(mesh, [sys.executable, "-W", "error", "-"], text).strip()
