"""Every runbook command, run as it stands on a healthy mesh, in a shell that knows only its data folder."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.mesh import HERMESH, Mesh

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "runbooks"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FUNCTION = re.compile(r"^\w+\(\) \{\n.*?^\}$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([\w-]+\.md)\)")
METRIC = re.compile(r"\bhermesh?_(?:session|agent|tool|memory|gateway|dependency|loop|active)_\w+")
OURS = ("meshkit", "services", "gateway")
# Counters with labels, of which a mesh that has just begun has nothing to tell.
NOT_YET = {"hermesh_agent_model_errors_total", "hermesh_session_dispatches_total"}
SECONDS = 200


@pytest.fixture(scope="module")
def embedded() -> Iterator[Mesh]:
    settings = {"HERMESH_DRAIN_DELAY_SECONDS": "0.5"}
    with Mesh(scripted_model=False, settings=settings) as mesh:
        yield mesh


def commands(page: Path) -> str:
    return "\n".join(BLOCK.findall(page.read_text()))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", sorted(page.name for page in PAGES.glob("*.md")))
def test_every_command_works(embedded: Mesh, name: str) -> None:
    # The functions of the index are known on every page.
    functions = FUNCTION.findall(commands(PAGES / "README.md"))
    assert len(functions) == 2
    script = "\n".join([*functions, commands(PAGES / name)])
    script = script.replace(".hermesh/", f"{embedded.data_dir}/").replace("df -h .hermesh", "df -h .")
    # Nothing of what the mesh was told: ports, URLs and keys are for `hermesh` to know.
    shell = {name: value for name, value in os.environ.items() if not name.startswith("HERMESH_")}
    shell |= {"HERMESH_DATA_DIR": str(embedded.data_dir), "PATH": f"{HERMESH.parent}:{os.environ['PATH']}"}
    if shutil.which("jq") is None:
        script = re.sub(r"\| jq .*", "", script)
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail"],
        input=script,
        cwd=ROOT,
        env=shell,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR" not in done.stderr
    for asked in set(re.findall(r"^\s*figure '?(\w+)", script, re.MULTILINE)) - NOT_YET:
        assert re.search(rf" {asked}\b", done.stdout), asked


def test_every_figure_is_one_of_ours() -> None:
    code = "".join(path.read_text() for folder in OURS for path in (ROOT / folder).rglob("*.py"))
    names = {name for page in PAGES.glob("*.md") for name in METRIC.findall(page.read_text())}
    assert names
    assert {name for name in names if f'"{name.removesuffix("_total")}' not in code} == set()


def test_the_index_names_every_page_and_each_link_leads_to_one() -> None:
    named = set(LINK.findall((PAGES / "README.md").read_text()))
    assert named == {page.name for page in PAGES.glob("*.md")} - {"README.md"}
    for page in PAGES.glob("*.md"):
        assert {link for link in LINK.findall(page.read_text()) if not (PAGES / link).exists()} == set()
