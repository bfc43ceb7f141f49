"""Where the CPU goes: samples processes of the mesh while they carry a scenario.

    python -m bench.profile --only clients_32 --only paced_100 [--processes agent-1,session-1] [--label after]

py-spy looks at each process 250 times a second from outside. Shares are of the samples of the event loop's
thread in which it was busy; a line stands for a function of ours with all that it calls in libraries, and
`the loop itself` for gRPC's and uvloop's own work between our callbacks. One table a process goes into
`bench/profiles/<scenario>-<label>.md`, so that what a change did to it can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import uvloop

from bench.facts import facts
from bench.measure import Run, measure
from bench.mesh import Mesh
from bench.run import SETTINGS, warm_up
from bench.scenarios import Replies, select
from bench.targets import MeshTarget

FOLDER = Path(__file__).resolve().parent / "profiles"
PROCESSES = "agent-1,session-1,gateway-1"
SAMPLES_A_SECOND = 250
LONGEST_SECONDS = 300
START_SECONDS = 2.0
SHOWN = 25
_OURS = re.compile(r"(.+) \(((?:services|meshkit|gateway)/[^:]+):\d+\)")
_LOOP = re.compile(r" \((?:uvloop|asyncio/runners\.py|meshkit/lifecycle\.py)")


def shares(raw: str) -> tuple[int, Counter[str]]:
    """Reads py-spy's raw format: `frame;frame;frame count` a line.

    Returns:
        The samples that count, and how many of them are of each function of ours.
    """
    counted: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, number = line.rpartition(" ")
        frames = stack.split(";")
        if any("threading.py" in frame for frame in frames):
            continue  # gRPC's poller, which mostly waits
        ours = next((found for frame in reversed(frames) if (found := _OURS.match(frame))), None)
        idle = ours is None or bool(_LOOP.search(frames[-1]))
        name = "the loop itself" if idle or ours is None else f"`{ours.group(1)}` {ours.group(2)}"
        counted[name] += int(number)
    return sum(counted.values()), counted


def page(scenario: Replies, label: str, run: Run, profiles: dict[str, str]) -> str:
    """Renders a scenario's profile."""
    known = facts()
    lines = [
        f"# {scenario.title}: {label}",
        "",
        f"Written by `python -m bench.profile`, commit {known['commit']}, Python {known['python']}.",
        f"While it was sampled the mesh wrote {run.figures['tokens_per_second']:,.0f} tokens/s",
        f"for {run.figures['cpu_per_1000']:.4f} CPU s / 1,000 tokens without stores.",
    ]
    for process, raw in profiles.items():
        total, counted = shares(raw)
        lines += ["", f"## {process}", "", "| share | function |", "|---|---|"]
        lines += [f"| {number / total:.1%} | {name} |" for name, number in counted.most_common(SHOWN)]
    return "\n".join(lines) + "\n"


async def sample(mesh: Mesh, scenario: Replies, processes: list[str]) -> tuple[Run, dict[str, str]]:
    """Runs a scenario under py-spy; returns its run, and each process's samples."""
    assert mesh.model is not None
    model = (mesh.model.url, mesh.model.process.pid)
    spy = Path(sys.executable).with_name("py-spy")
    if not spy.exists():
        raise SystemExit("py-spy is not installed: make install")
    with tempfile.TemporaryDirectory() as folder:
        async with MeshTarget(mesh) as target:
            await measure(target, warm_up(scenario), model)
            await measure(target, scenario, model)
            spies: list[asyncio.subprocess.Process] = []
            for name in processes:
                command = [
                    str(spy),
                    "record",
                    "-d",
                    str(LONGEST_SECONDS),
                    "-r",
                    str(SAMPLES_A_SECOND),
                    "-f",
                    "raw",
                ]
                command += ["-o", f"{folder}/{name}", "-p", str(target.processes()[name])]
                spies.append(
                    await asyncio.create_subprocess_exec(
                        *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                    )
                )
            try:
                await asyncio.sleep(START_SECONDS)
                run = await measure(target, scenario, model)
            finally:
                for one in spies:
                    one.send_signal(signal.SIGINT)
                    await one.wait()
        return run, {name: (Path(folder) / name).read_text() for name in processes}


def main() -> None:
    """Parses the arguments, starts a mesh, samples each scenario and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", required=True, metavar="NAME", help="a scenario of replies"
    )
    parser.add_argument("--processes", default=PROCESSES)
    parser.add_argument("--label", default="now", help="what the tables are of")
    arguments = parser.parse_args()
    chosen = [one for one in select(arguments.only, quick=False) if isinstance(one, Replies)]
    FOLDER.mkdir(exist_ok=True)
    with Mesh(settings=SETTINGS) as mesh:
        for scenario in chosen:
            run, profiles = uvloop.run(sample(mesh, scenario, arguments.processes.split(",")))
            path = FOLDER / f"{scenario.name}-{arguments.label}.md"
            path.write_text(page(scenario, arguments.label, run, profiles))
            print(f"written: {path}")


if __name__ == "__main__":
    main()
