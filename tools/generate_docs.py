"""Writes the files that come from the code: pages of settings and error reasons, compose's Envoy.

Run by `make docs`; `--check` (in `make check`) fails where a file is not what the code says.
"""

import re
import sys
from pathlib import Path

from gateway.settings import GatewaySettings
from launcher.envoy import render_chart, render_compose
from launcher.settings import LauncherSettings
from meshkit.settings import settings_table
from services.agent.settings import AgentSettings
from services.memory.settings import MemorySettings
from services.session.settings import SessionSettings
from services.tool.settings import ToolSettings

ROOT = Path(__file__).resolve().parent.parent
REASON = re.compile(r"((?:^  // .*\n)+)^  ERROR_REASON_(\w+) = \d+;", re.MULTILINE)

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
            settings_table(*SETTINGS),
        ]
    )


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
        "deploy/envoy/compose.yaml": render_compose(),
        "deploy/kubernetes/hermesh/files/envoy.yaml": render_chart(),
    }
    for name, text in files.items():
        path = ROOT / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(name)
    if stale:
        raise SystemExit(f"{', '.join(stale)}: not what the code says; run `make docs` and commit")


if __name__ == "__main__":
    main()
