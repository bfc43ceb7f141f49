"""Writes the files that come from the code: pages of settings and reasons, settings' names,
Envoy's configuration for compose and the chart, the chart for kustomize.

Run by `make docs`; `--check` (in `make check`) fails where a file is not what the code says.
"""

import re
import sys
from pathlib import Path

from gateway.settings import GatewaySettings
from launcher.envoy import render_chart, render_compose
from launcher.settings import LauncherSettings
from meshkit.settings import env_name, secret_names, settings_table
from services.agent.settings import AgentSettings
from services.memory.settings import MemorySettings
from services.session.settings import SessionSettings
from services.tool.settings import ToolSettings
from tools import kustomize

ROOT = Path(__file__).resolve().parent.parent
REASON = re.compile(r"((?:^  // .*\n)+)^  ERROR_REASON_(\w+) = \d+;", re.MULTILINE)

CHARTS_FILES = "deploy/kubernetes/hermesh/files"
SETTINGS = (
    LauncherSettings,
    SessionSettings,
    AgentSettings,
    ToolSettings,
    MemorySettings,
    GatewaySettings,
)


def settings_page() -> str:
    """The page of settings: one table."""
    return "\n".join(
        [
            "# Settings",
            "",
            "Made from the code by `make docs`. Every setting is an environment variable. The command",
            "`hermesh` gives each process what it reads; under compose or Kubernetes set them yourself.",
            "",
            "`hermesh up` keeps what it was told in `settings.json` in the data folder, for its owner only,",
            "passwords in URLs and keys included, as those of the embedded parts are. The next `up`, from",
            "any shell, goes by it: what a shell sets goes before, and `NAME= hermesh up` takes one back.",
            "`hermesh status` shows what a mesh was started with, `hermesh env` all values. A start on",
            "another database or object store than last time asks at a terminal and is refused without one,",
            "unless `--yes` says that it is meant. A variable that begins with `HERMESH_` and is none of",
            "these is named by `hermesh up` and in each process's log.",
            "",
            "A secret can stand in a file: `NAME_FILE=/run/secrets/name` in the place of `NAME`, for each of",
            f"{', '.join(f'`{name}`' for name in sorted(_secrets()))}.",
            "The path is absolute; a line end that closes the file is not part of the secret. Both set, or a",
            "file that is missing, empty or above 64 KiB, ends the process with one line. Files are read at",
            "the start: one that changed takes effect with the next.",
            "",
            settings_table(*SETTINGS),
        ]
    )


def variables() -> str:
    """The names of all settings, one a line, and which are secrets."""
    names = {env_name(cls, field) for cls in SETTINGS for field in cls.model_fields}
    secrets = _secrets()
    return "".join(f"{name} secret\n" if name in secrets else f"{name}\n" for name in sorted(names))


def _secrets() -> set[str]:
    return {name for cls in SETTINGS for name in secret_names(cls)}


def errors_page() -> str:
    """The page of error reasons, from the comments of the proto."""
    proto = (ROOT / "protos/hermesh/common/v1/error_reason.proto").read_text()
    rows = [
        f"| `{name}` | {' '.join(line.strip().removeprefix('// ') for line in comment.splitlines())} |"
        for comment, name in REASON.findall(proto)
        if name != "UNSPECIFIED"
    ]
    return "\n".join(
        [
            "# Error reasons",
            "",
            "Made from `protos/hermesh/common/v1/error_reason.proto` by `make docs`. Over gRPC the reason",
            "is in `google.rpc.ErrorInfo` (domain `hermesh`), over HTTP in the problem document's `reason`.",
            "",
            "| reason | meaning |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Writes the files, or compares them with `--check`."""
    stale = []
    files = {
        "docs/settings.md": settings_page(),
        "docs/errors.md": errors_page(),
        "meshkit/variables.txt": variables(),
        "deploy/envoy/compose.yaml": render_compose(),
        f"{CHARTS_FILES}/envoy.yaml": render_chart(),
        # A chart reads no file outside of its folder.
        f"{CHARTS_FILES}/serve.sh": (ROOT / "deploy/envoy/serve.sh").read_text(),
        f"{CHARTS_FILES}/hermesh.rules.yml": (ROOT / "deploy/prometheus/hermesh.rules.yml").read_text(),
    }
    # The chart is rendered as its files are: before what comes from it, what goes into it.
    if "--check" not in sys.argv:
        for name in files:
            if name.startswith(CHARTS_FILES):
                (ROOT / name).write_text(files[name])
    files |= {f"deploy/kubernetes/kustomize/{name}": text for name, text in kustomize.render().items()}
    for name, text in files.items():
        path = ROOT / name
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(name)
    if stale:
        raise SystemExit(f"{', '.join(stale)}: not what the code says; run `make docs` and commit")


if __name__ == "__main__":
    main()
