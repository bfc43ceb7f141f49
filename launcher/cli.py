"""The command `hermesh`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from shlex import quote
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from launcher import control, conversation, kept, upgrade
from launcher.backup.command import app as backups
from launcher.cells.command import app as cells
from launcher.common import (
    Json,
    api_of,
    console,
    grpc_address,
    http_url,
    notes,
    require_running,
    settings_here,
    settings_of_mesh,
)
from launcher.embedded.postgres import link_data
from launcher.errors import LaunchError, explain_os_error
from launcher.folder import Folder
from launcher.plan import MAX_REPLICAS, Plan, fingerprint, parse_replicas
from launcher.ports import port_problem
from launcher.restart import parse_service
from launcher.settings import LauncherSettings
from launcher.state import State
from meshkit import variables

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Runs a Hermesh mesh on this machine and talks to it.",
)
# PostgreSQL asks for its log 16 MiB at a time.
FULL_BYTES = 16 * 1024 * 1024


def _progress(text: str) -> Any:
    """A spinner on a terminal, and one line elsewhere."""
    if console.is_terminal:
        return console.status(text)
    typer.echo(text, err=True)
    return nullcontext()


@app.command()
def up(
    replicas: Annotated[str, typer.Option(help="How many of what, such as agent=3,session=2.")] = "",
    reply: Annotated[bool, typer.Option(help="Stream one real reply when all is up.")] = True,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Start on other stores than last time without asking.")
    ] = False,
) -> None:
    """Start the mesh in the background, or what is missing of it, and wait until it is ready.

    One that another version started is brought to this one part by part, and no client notices.
    Settings that this shell does not name are those of the last start; NAME= hermesh up takes one back.
    """
    began = time.monotonic()
    wanted = parse_replicas(replicas)
    for unknown in variables.unknown(os.environ):
        notes.print(str(unknown), style="yellow", markup=False, highlight=False, soft_wrap=True)
    here = kept.told(os.environ)
    settings, folder = settings_here()
    folder.prepare()
    fresh = control.supervisor_of(folder) is None
    former = upgrade.other(folder)
    asked = fingerprint()
    alone = fresh and not any(child.identity.alive for child in State.load(folder.state_file).children)
    if fresh:
        _check_stores(folder, yes=yes)
        _show_kept(folder, here)
        _check_ports(settings, folder)
        plan = Plan(settings, folder, {"mesh": 0, "model": 0})
        if plan.postgres:
            # What is wrong with the data is said at once, before anything runs.
            plan.postgres.initialize()
            link_data(folder.postgres, plan.postgres)
    with _progress("starting the mesh") as status, _all_or_nothing(folder, fresh=alone):

        def said(text: str) -> None:
            if status is not None:
                status.update(text)
            else:
                typer.echo(text)

        if former:
            upgrade.take_over(folder, former, said)
        elif fresh:
            control.start_supervisor(folder)
        request = {"command": "up", "replicas": wanted, "settings": asked, "prepared": former is not None}
        answer = control.ask(folder, request, said)
    addresses = State.load(folder.state_file).addresses
    console.print(f"The mesh is up after {time.monotonic() - began:.1f} s.", highlight=False)
    console.print(f"  chat page and HTTP API  http://{addresses['http']}/", highlight=False)
    console.print(f"  gRPC                    {addresses['grpc']}", highlight=False)
    key = str(folder.api_key_file)
    if settings.api_key.get_secret_value():
        key = os.environ.get("HERMESH_API_KEY_FILE") or "HERMESH_API_KEY"
    console.print(f"  API key                 in {key}", highlight=False, soft_wrap=True)
    _warn_of_settings(folder, changed=answer["settings_changed"])
    if reply:
        question = "What is the capital of France?"
        console.print(f"\n> {question}", highlight=False)
        with api_of(folder, settings) as api:
            conversation.ask(api, question)


@contextmanager
def _all_or_nothing(folder: Folder, *, fresh: bool) -> Iterator[None]:
    """What cannot start, or is not to after all, is not left half there, retrying for nobody."""
    try:
        yield
    except (LaunchError, KeyboardInterrupt) as error:
        if fresh:
            control.stop(folder)
        if isinstance(error, LaunchError):
            raise
        rest = "what was started is stopped again" if fresh else "what runs goes on"
        raise LaunchError(f"interrupted; {rest}") from None


def _check_stores(folder: Folder, *, yes: bool) -> None:
    """Has a person know when what is kept would be looked for elsewhere than last time.

    Raises:
        LaunchError: It would, and nobody said that it may.
    """
    before = kept.Kept.load(folder)
    moved = kept.moved(before, kept.told(os.environ), folder)
    if not moved:
        return
    said = "; ".join(f"the {was.what} was {was.place} and would now be {now.place}" for was, now in moved)
    names = " and ".join(now.variable for _, now in moved)
    safe = "What is there stays as it is, but this mesh would show none of it"
    # Only what another one has taken the place of is in this shell; the rest comes from the folder.
    back = f"for those of last time leave {names} unset" if before.exists else f"for that one unset {names}"
    if yes:
        stays = f"{said}. What was there stays as it is."
        notes.print(stays, style="yellow", markup=False, highlight=False, soft_wrap=True)
        return
    if not _somebody_there():
        raise LaunchError(f"not started: {said}. {safe}: {back}; to start on the others: hermesh up --yes")
    notes.print(f"{said}.\n{safe}: {back}.", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not typer.confirm("Start on the others?", err=True):
        raise LaunchError("not started; nothing was changed")


def _somebody_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _show_kept(folder: Folder, here: Mapping[str, str]) -> None:
    """Says which settings come from last time: nothing holds that nobody sees."""
    used = {name: value for name, value in kept.told(os.environ).items() if name not in here}
    if used:
        console.print("As last time (NAME= hermesh up takes one back):", highlight=False)
        _print_settings(used)


def _print_settings(settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        console.print(f"  {name}={kept.shown(name, value)}", markup=False, highlight=False, soft_wrap=True)


def _check_ports(settings: LauncherSettings, folder: Folder) -> None:
    """Says which port cannot be had, unless Envoy of an earlier supervisor is what listens there."""
    names: dict[int, str] = {}
    for name, port in settings.fixed_ports.items():
        if port in names:
            raise LaunchError(f"{names[port]} and {name} are the same; set one to another port")
        names[port] = name
    first, last = settings.gateway_port, settings.gateway_port + MAX_REPLICAS
    for port, name in {settings.mesh_port: "HERMESH_MESH_PORT", **names}.items():
        if first and first <= port <= last:
            raise LaunchError(
                f"{name} is {port}, and gateways may need {first} to {last}; "
                "set it or HERMESH_GATEWAY_PORT to another port"
            )
    state = State.load(folder.state_file)
    ours = any(c.service == "envoy" and c.identity.alive for c in state.children)
    for name, port in settings.fixed_ports.items():
        if ours and f"127.0.0.1:{port}" in state.addresses.values():
            continue
        if problem := port_problem(port):
            raise LaunchError(f"port {port} {problem}; free it, or set {name} to another port")


@app.command()
def down() -> None:
    """Stop the mesh and everything embedded; the data stays."""
    _, folder = settings_here()
    with _progress("stopping the mesh"):
        count = control.stop(folder)
    console.print(f"Stopped {count} processes." if count else "Nothing runs.", highlight=False)


@app.command()
def status(as_json: Json = False) -> None:
    """Show every process: where it is and how it is."""
    _, folder = settings_here()
    rows: list[dict[str, Any]] = []
    if control.supervisor_of(folder) is not None:
        rows = control.ask(folder, {"command": "status"})
    else:
        # Killed, or never started: what an earlier one left behind is shown all the same.
        rows = [
            {"service": c.service, "replica": c.replica, "pid": c.pid, "address": c.address}
            | {
                "health": "unsupervised",
                "reason": "",
                "restarts": c.restarts,
                "last_exit": c.last_exit,
                "external": False,
            }
            for c in State.load(folder.state_file).children
            if c.identity.alive
        ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        raise LaunchError(f"no mesh runs in {folder.root}; start it with: hermesh up")
    table = Table()
    for name in ("service", "replica", "pid", "address", "health", "reason", "restarts", "last exit"):
        table.add_column(name, overflow="fold")
    for row in rows:
        colour = {"healthy": "green", "unhealthy": "red"}.get(row["health"], "yellow")
        cells = [str(row[name] or "") for name in ("service", "replica", "pid", "address")]
        # A supervisor of an earlier version gives no reasons.
        why, restarts = escape(row.get("reason", "")), str(row["restarts"] or "")
        table.add_row(*cells, f"[{colour}]{row['health']}", why, restarts, escape(row["last_exit"]))
    console.print(table)
    if any(row["health"] == "unsupervised" for row in rows):
        console.print("The supervisor is gone; hermesh up takes these over, hermesh down ends them.")
    if told := kept.Kept.load(folder).variables:
        console.print("Started with (hermesh env has the values):", highlight=False)
        _print_settings(told)


@app.command()
def scale(
    replicas: Annotated[list[str], typer.Argument(help="Such as agent=5; several at once.")],
) -> None:
    """Change how many replicas run; nothing else restarts."""
    wanted = parse_replicas(",".join(replicas))
    _, folder = settings_here()
    require_running(folder)
    with _progress("scaling"):
        control.ask(folder, {"command": "scale", "replicas": wanted})
    console.print(", ".join(f"{name}: {number}" for name, number in wanted.items()), highlight=False)
    for name in (name for name, number in wanted.items() if not number):
        console.print(
            f"[yellow]No {name} is left: what needs one waits, or fails, until one is added.[/yellow]"
        )


@app.command()
def restart(
    service: Annotated[str, typer.Argument(help="agent, session, gateway, tool, memory, or all of them.")],
    rolling: Annotated[
        bool, typer.Option("--rolling", help="One by one, each successor first: no client notices.")
    ] = False,
) -> None:
    """Start new processes in place of those that run, with the settings of hermesh up.

    Without --rolling all replicas of a service end before the new ones start: calls fail meanwhile.
    """
    _, folder = settings_here()
    parse_service(service)
    require_running(folder)
    if place := upgrade.elsewhere(folder):
        raise LaunchError(
            f"the mesh runs what is in {place}, and would again; hermesh up brings it to what is here"
        )
    request = {"command": "restart", "service": service, "rolling": rolling, "settings": fingerprint()}
    began = time.monotonic()
    answer = control.ask(folder, request, lambda text: console.print(text, highlight=False))
    console.print(f"Restarted {service} in {time.monotonic() - began:.1f} s.", highlight=False)
    _warn_of_settings(folder, changed=answer["settings_changed"])


def _warn_of_settings(folder: Folder, *, changed: bool) -> None:
    if not changed:
        return
    before, now = kept.Kept.load(folder).variables, kept.told(os.environ)
    names = sorted(name for name in before | now if before.get(name) != now.get(name))
    which = f" ({', '.join(names)})" if names else ""
    console.print(f"[yellow]The settings here{which} are not those that the mesh was started with.[/yellow]")
    console.print("[yellow]They take effect after hermesh down and hermesh up.[/yellow]")


@app.command()
def logs(
    service: Annotated[str, typer.Argument(help="A service or a replica; all if left out.")] = "",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many lines of each file.")] = 100,
) -> None:
    """Show what the processes log."""
    _, folder = settings_here()
    files = sorted(folder.logs.glob("*.log")) if folder.logs.is_dir() else []
    files = [path for path in files if service in ("", path.stem, path.stem.rpartition("-")[0])]
    if not files:
        raise LaunchError(f"there is no log of {service or 'anything'} in {folder.logs}")
    command = ["tail", "-q" if len(files) == 1 else "-v", "-n", str(lines)]
    if follow:
        os.execvp("tail", [*command, "-F", *map(str, files)])  # noqa: S606 - no shell is wanted
    subprocess.run([*command, *map(str, files)], check=False)


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date, as `up` does by itself."""
    settings, folder = settings_of_mesh()
    plan = Plan(settings, folder, State.load(folder.state_file).ports)
    if plan.postgres:
        require_running(folder)
    upgrade.set_up(plan, lambda text: console.print(text, highlight=False))


@app.command()
def env(name: Annotated[str, typer.Argument(help="One variable; all if left out.")] = "") -> None:
    """Print what the running mesh works with: where it and its stores are, and what it was told.

    For psql, redis-cli, curl and the like. The values hold passwords and keys.
    """
    settings, folder = settings_of_mesh()
    plan = Plan(settings, folder, State.load(folder.state_file).ports or {"mesh": 0, "model": 0})
    told = {
        name: value for name, value in kept.told(os.environ).items() if name not in variables.secret_files()
    }
    # What stands in files is printed as it is: both together would be refused.
    values = told | {
        "HERMESH_DATA_DIR": str(folder.root),
        "HERMESH_HTTP_URL": http_url(folder, settings),
        "HERMESH_GRPC_ADDRESS": grpc_address(folder, settings),
        "HERMESH_DATABASE_URL": plan.database_url,
        "HERMESH_REDIS_URL": plan.redis_url,
        "HERMESH_OBJECT_STORE_URL": plan.object_store_url,
        "HERMESH_LLM_BASE_URL": plan.llm_base_url,
        "HERMESH_LLM_API_KEY": plan.llm_api_key,
        "HERMESH_API_KEY": plan.api_key,
    }
    if name and name not in values:
        raise LaunchError(f"{name} is not one of {', '.join(values)}")
    typer.echo(values[name] if name else "\n".join(f"{key}={quote(value)}" for key, value in values.items()))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench(context: typer.Context) -> None:
    """Measure what a mesh costs on this machine; hermesh bench --help lists what it takes."""
    from launcher.benchmark import command

    line = command(context.args)
    os.execv(line[0], line)  # noqa: S606 - no shell is wanted


@app.command()
def doctor() -> None:
    """Look for what would keep the mesh from running, and say what to do."""
    from launcher.doctor import findings

    settings, _ = settings_here()
    wrong = 0
    for finding in findings(settings):
        wrong += bool(finding.remedy)
        mark = "[red]✗[/red]" if finding.remedy else "[green]✓[/green]"
        console.print(f"{mark} {finding.what}: {finding.found}", highlight=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"    {finding.remedy}", highlight=False, soft_wrap=True, markup=False)
    if wrong:
        raise SystemExit(1)


app.add_typer(cells, name="cells")
app.registered_commands += conversation.app.registered_commands + backups.registered_commands


def main() -> None:
    """Runs the command; what a person has to put right is one line on stderr and status 1."""
    try:
        app()
    except LaunchError as error:
        _fail(f"{error}{_full_disk(str(error))}")
    except OSError as error:
        _fail(str(explain_os_error(error, f"use {error.filename}" if error.filename else "go on")))


def _full_disk(said: str) -> str:
    """The reason behind many a failure, where it is this one and nobody has said so."""
    try:
        root = settings_here()[1].root
        free = shutil.disk_usage(root).free
    except OSError:
        return ""
    return f"; there is no space left in {root}" if free < FULL_BYTES and "space" not in said else ""


def _fail(text: str) -> None:
    sys.stderr.write(f"hermesh: {text}\n")
    raise SystemExit(1)


if __name__ == "__main__":
    main()
