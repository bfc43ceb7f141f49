"""The command `hermesh`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launcher import control
from launcher.actions import DECISIONS, full_id, lines
from launcher.embedded.postgres import link_data
from launcher.errors import LaunchError, explain_os_error
from launcher.folder import Folder
from launcher.patience import explained
from launcher.plan import Plan, fingerprint, parse_replicas
from launcher.ports import port_problem
from launcher.restart import parse_service
from launcher.settings import LauncherSettings
from launcher.state import State
from launcher.talk import show
from meshkit.settings import load

if TYPE_CHECKING:
    from launcher.api import Api

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Runs a Hermesh mesh on this machine and talks to it.",
)
# Where nobody watches, a line is a line: tables and paths are not folded to 80 columns.
console = Console(width=None if sys.stdout and sys.stdout.isatty() else 200)
notes = Console(stderr=True)

# PostgreSQL asks for its log 16 MiB at a time.
FULL_BYTES = 16 * 1024 * 1024

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _settings() -> tuple[LauncherSettings, Folder]:
    settings = load(LauncherSettings)
    return settings, Folder(settings.folder)


def _require_running(folder: Folder) -> None:
    if control.supervisor_of(folder) is None:
        raise LaunchError(f"no mesh runs in {folder.root}; start it with: hermesh up")


def _api(folder: Folder, settings: LauncherSettings) -> Api:
    _require_running(folder)
    # Only what talks to the mesh pays for an HTTP client.
    from launcher.api import Api

    key = settings.api_key.get_secret_value()
    if not key:
        if not folder.api_key_file.exists():
            raise LaunchError("the mesh was started with a key of yours; set HERMESH_API_KEY to it here too")
        key = folder.secret("api-key")
    address = State.load(folder.state_file).addresses.get("http", f"127.0.0.1:{settings.http_port}")
    return Api(f"http://{address}", key)


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
) -> None:
    """Start the mesh in the background, or what is missing of it, and wait until it is ready."""
    began = time.monotonic()
    wanted = parse_replicas(replicas)
    settings, folder = _settings()
    folder.prepare()
    fresh = control.supervisor_of(folder) is None
    if fresh:
        _check_ports(settings, folder)
        plan = Plan(settings, folder, {"mesh": 0, "model": 0})
        if plan.postgres:
            # What is wrong with the data is said at once, before anything runs.
            plan.postgres.initialize()
            link_data(folder.postgres, plan.postgres)
    with _progress("starting the mesh") as status, _all_or_nothing(folder, fresh=fresh):

        def said(text: str) -> None:
            if status is not None:
                status.update(text)
            else:
                typer.echo(text)

        if fresh:
            control.start_supervisor(folder)
        request = {"command": "up", "replicas": wanted, "settings": fingerprint()}
        answer = control.ask(folder, request, said)
    addresses = State.load(folder.state_file).addresses
    console.print(f"The mesh is up after {time.monotonic() - began:.1f} s.", highlight=False)
    console.print(f"  chat page and HTTP API  http://{addresses['http']}/", highlight=False)
    console.print(f"  gRPC                    {addresses['grpc']}", highlight=False)
    key = "HERMESH_API_KEY" if settings.api_key.get_secret_value() else str(folder.api_key_file)
    console.print(f"  API key                 in {key}", highlight=False, soft_wrap=True)
    _warn_of_settings(changed=answer["settings_changed"])
    if reply:
        question = "What is the capital of France?"
        console.print(f"\n> {question}", highlight=False)
        with _api(folder, settings) as api:
            show(_explained(api, api.run(api.create_session("Hello"), question)), console)


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


def _check_ports(settings: LauncherSettings, folder: Folder) -> None:
    """Says which port cannot be had, unless Envoy of an earlier supervisor is what listens there."""
    if settings.http_port == settings.grpc_port:
        raise LaunchError("HERMESH_HTTP_PORT and HERMESH_GRPC_PORT are the same; set one to another port")
    state = State.load(folder.state_file)
    ours = any(c.service == "envoy" and c.identity.alive for c in state.children)
    for name, port in (("HERMESH_HTTP_PORT", settings.http_port), ("HERMESH_GRPC_PORT", settings.grpc_port)):
        if ours and f"127.0.0.1:{port}" in state.addresses.values():
            continue
        if problem := port_problem(port):
            raise LaunchError(f"port {port} {problem}; free it, or set {name} to another port")


@app.command()
def down() -> None:
    """Stop the mesh and everything embedded; the data stays."""
    _, folder = _settings()
    with _progress("stopping the mesh"):
        count = control.stop(folder)
    console.print(f"Stopped {count} processes." if count else "Nothing runs.", highlight=False)


@app.command()
def status(as_json: Json = False) -> None:
    """Show every process: where it is and how it is."""
    _, folder = _settings()
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
        why, restarts = row.get("reason", ""), str(row["restarts"] or "")
        table.add_row(*cells, f"[{colour}]{row['health']}", why, restarts, row["last_exit"])
    console.print(table)
    if any(row["health"] == "unsupervised" for row in rows):
        console.print("The supervisor is gone; hermesh up takes these over, hermesh down ends them.")


@app.command()
def scale(
    replicas: Annotated[list[str], typer.Argument(help="Such as agent=5; several at once.")],
) -> None:
    """Change how many replicas run; nothing else restarts."""
    wanted = parse_replicas(",".join(replicas))
    _, folder = _settings()
    _require_running(folder)
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
    _, folder = _settings()
    parse_service(service)
    _require_running(folder)
    request = {"command": "restart", "service": service, "rolling": rolling, "settings": fingerprint()}
    began = time.monotonic()
    answer = control.ask(folder, request, lambda text: console.print(text, highlight=False))
    console.print(f"Restarted {service} in {time.monotonic() - began:.1f} s.", highlight=False)
    _warn_of_settings(changed=answer["settings_changed"])


def _warn_of_settings(*, changed: bool) -> None:
    if changed:
        console.print("[yellow]The settings here are not those that the mesh was started with.[/yellow]")
        console.print("[yellow]They take effect after hermesh down and hermesh up.[/yellow]")


@app.command()
def logs(
    service: Annotated[str, typer.Argument(help="A service or a replica; all if left out.")] = "",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many lines of each file.")] = 100,
) -> None:
    """Show what the processes log."""
    _, folder = _settings()
    files = sorted(folder.logs.glob("*.log")) if folder.logs.is_dir() else []
    files = [path for path in files if service in ("", path.stem, path.stem.rpartition("-")[0])]
    if not files:
        raise LaunchError(f"there is no log of {service or 'anything'} in {folder.logs}")
    command = ["tail", "-q" if len(files) == 1 else "-v", "-n", str(lines)]
    if follow:
        os.execvp("tail", [*command, "-F", *map(str, files)])  # noqa: S606 - no shell is wanted
    subprocess.run([*command, *map(str, files)], check=False)


@app.command()
def run(
    message: Annotated[str, typer.Argument(help="What to say.")],
    session: Annotated[str, typer.Option(help="Go on with this session.")] = "",
    as_json: Json = False,
) -> None:
    """Say one thing and stream the reply; with --json, its events."""
    settings, folder = _settings()
    with _api(folder, settings) as api:
        events = _explained(api, api.run(session or api.create_session(), message))
        if not as_json:
            show(events, console)
            return
        failed = ""
        for event in events:
            typer.echo(json.dumps(event, ensure_ascii=False))
            if event["type"] == "run.failed":
                failed = event["data"]["message"]
        if failed:
            raise LaunchError(f"the run failed: {failed}")


def _explained(api: Api, events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Has a run that is silent say what it waits for, on stderr: the output is the reply's."""
    return explained(events, api.problem, lambda text: notes.print(text, style="dim", highlight=False))


@app.command()
def chat(
    session: Annotated[str, typer.Option(help="Resume this session; see hermesh sessions.")] = "",
) -> None:
    """Chat in the terminal; Ctrl-C stops a reply, Ctrl-D leaves."""
    settings, folder = _settings()
    with _api(folder, settings) as api:
        if session:
            for message in api.messages(session):
                if message["role"] in ("user", "assistant") and message["content"]:
                    mark = "> " if message["role"] == "user" else ""
                    console.print(f"{mark}{message['content']}", markup=False, highlight=False)
        else:
            session = api.create_session()
        console.print(f"[dim]session {session}; Ctrl-D leaves[/dim]", highlight=False)
        while True:
            try:
                text = console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if text:
                _exchange(api, session, text)


def _exchange(api: Api, session: str, text: str) -> None:
    current = ""

    def noted(events: Any) -> Any:
        nonlocal current
        for event in events:
            current = event["run_id"]
            yield event

    try:
        show(noted(_explained(api, api.run(session, text))), console)
    except KeyboardInterrupt:
        if current:
            api.cancel(current)
        console.print("\n[dim]stopped[/dim]")
    except LaunchError as error:
        notes.print(str(error), markup=False, highlight=False)


@app.command()
def sessions(as_json: Json = False) -> None:
    """List the sessions, last changed first."""
    settings, folder = _settings()
    with _api(folder, settings) as api:
        found = api.sessions()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table()
    for name in ("session", "title", "messages", "changed"):
        table.add_column(name, overflow="fold")
    for one in found:
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(one["update_time_ms"]) / 1000))
        table.add_row(one["session_id"], one["title"], str(one["message_count"]), changed)
    console.print(table)


@app.command()
def actions(as_json: Json = False) -> None:
    """List the tool calls that wait for a person, in all sessions, with the commands that settle them."""
    settings, folder = _settings()
    with _api(folder, settings) as api:
        found = api.actions()
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    if not found:
        console.print("Nothing waits for a person.")
    for action in found:
        for line in lines(action, time.time()):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def resolve(
    run: Annotated[str, typer.Argument(help="The run, as hermesh actions lists it.")],
    call: Annotated[str, typer.Argument(help="The call, such as 1:0, or its whole id.")],
    decision: Annotated[
        str,
        typer.Argument(
            help="completed (it was done), failed (it was not), retry (run it again), abandon (give the run "
            "up); of a call that needs approval: approve or deny."
        ),
    ],
    content: Annotated[str, typer.Option(help="The result or the reason, for the model.")] = "",
) -> None:
    """Decide about a tool call that waits for a person; its run goes on, on whichever replica is free."""
    if decision not in DECISIONS:
        raise LaunchError(f"{decision[:100]!r} is no decision; it is one of: {', '.join(DECISIONS)}")
    settings, folder = _settings()
    with _api(folder, settings) as api:
        settled = api.resolve(run, full_id(run, call), decision, content)
    console.print(f"{decision}; the run is {settled['status']}", markup=False, highlight=False)


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date, as `up` does by itself."""
    settings, folder = _settings()
    plan = Plan(settings, folder, State.load(folder.state_file).ports)
    if plan.postgres:
        _require_running(folder)
    for what, command, environment in plan.setup_commands():
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            why = said[-1].removeprefix("hermesh: ") if said else f"status {done.returncode}"
            raise LaunchError(f"{what} failed: {why}")
        console.print(f"{what}: done", highlight=False)


@app.command()
def env(name: Annotated[str, typer.Argument(help="One variable; all if left out.")] = "") -> None:
    """Print where the stores are, for psql, redis-cli and the like. The URLs hold passwords."""
    settings, folder = _settings()
    plan = Plan(settings, folder, State.load(folder.state_file).ports or {"mesh": 0, "model": 0})
    values = {
        "HERMESH_DATABASE_URL": plan.database_url,
        "HERMESH_REDIS_URL": plan.redis_url,
        "HERMESH_OBJECT_STORE_URL": plan.object_store_url,
        "HERMESH_LLM_BASE_URL": plan.llm_base_url,
        "HERMESH_LLM_API_KEY": plan.llm_api_key,
        "HERMESH_API_KEY": plan.api_key,
    }
    if name and name not in values:
        raise LaunchError(f"{name} is not one of {', '.join(values)}")
    typer.echo(values[name] if name else "\n".join(f"{key}={value}" for key, value in values.items()))


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

    settings = load(LauncherSettings)
    wrong = 0
    for finding in findings(settings):
        wrong += bool(finding.remedy)
        mark = "[red]✗[/red]" if finding.remedy else "[green]✓[/green]"
        console.print(f"{mark} {finding.what}: {finding.found}", highlight=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"    {finding.remedy}", highlight=False, soft_wrap=True, markup=False)
    if wrong:
        raise SystemExit(1)


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
        root = _settings()[1].root
        free = shutil.disk_usage(root).free
    except OSError:
        return ""
    return f"; there is no space left in {root}" if free < FULL_BYTES and "space" not in said else ""


def _fail(text: str) -> None:
    sys.stderr.write(f"hermesh: {text}\n")
    raise SystemExit(1)


if __name__ == "__main__":
    main()
