"""`hermesh chat`: streams in the terminal, goes on over several turns, and resumes a session."""

import re
import subprocess

from bench.mesh import HERMESH, Mesh
from tests.e2e.client import http


def chat(mesh: Mesh, said: str, *arguments: str) -> str:
    """Runs a chat in which a person types these lines and then Ctrl-D."""
    done = subprocess.run(
        [str(HERMESH), "chat", *arguments],
        env=mesh.environment,
        input=said,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_a_chat_is_kept_and_resumed(mesh: Mesh) -> None:
    first = chat(mesh, "[[echo]] the first word\n[[echo]] the second word\n")
    assert first.count("the first word") == 1, "the reply; what was typed is the terminal's to show"
    assert "the second word" in first
    found = re.search(r"session ([0-9a-f-]{36})", first)
    assert found is not None
    session = found[1]
    resumed = chat(mesh, "[[echo]] the third word\n", "--session", session)
    assert "> [[echo]] the first word" in resumed
    assert "the third word" in resumed
    async with http(mesh) as client:
        messages = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3


async def test_a_run_that_fails_does_not_end_the_chat(mesh: Mesh) -> None:
    shown = chat(mesh, "[[status=401]]\n[[echo]] still here\n")
    assert "still here" in shown
