"""The commands of `hermesh` that talk to a mesh: runs, chats, sessions, and what waits for a person."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.actions import DECISIONS, full_id, lines
from launcher.common import Json, api_of, console, notes, settings_here
from launcher.errors import LaunchError
from launcher.patience import explained
from launcher.talk import show

if TYPE_CHECKING:
    from launcher.api import Api, Written

app = typer.Typer()

# What a shell expects of a command that Ctrl-C ended.
INTERRUPTED = 130


class Followed:
    """A run's events on their way to the screen, and which run it is."""

    def __init__(self, api: Api, events: Iterator[Written], run_id: str = "") -> None:
        self._events = explained(
            events, api.problem, lambda text: notes.print(text, style="dim", markup=False, highlight=False)
        )
        self.run_id = run_id

    def __iter__(self) -> Iterator[Written]:
        # On stderr a run that is silent says what it waits for: the output is the reply's.
        for event in self._events:
            self.run_id = event["run_id"]
            yield event


@app.command()
def run(
    message: Annotated[str, typer.Argument(help="What to say.")],
    session: Annotated[str, typer.Option(help="Go on with this session.")] = "",
    stop: Annotated[bool, typer.Option("--stop", help="Have Ctrl-C stop the run, too.")] = False,
    as_json: Json = False,
) -> None:
    """Say one thing and stream the reply; with --json, its events. Ctrl-C leaves, and the run goes on."""
    settings, folder = settings_here()
    with api_of(folder, settings) as api:
        session = session or api.create_session()
        _print(api, Followed(api, api.run(session, message)), session, stop=stop, as_json=as_json)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(help="The run.")],
    as_json: Json = False,
) -> None:
    """Show a run from its beginning on, and follow it to its end. Ctrl-C leaves, and the run goes on."""
    settings, folder = settings_here()
    with api_of(folder, settings) as api:
        _print(api, Followed(api, api.watch(run), run), "", stop=False, as_json=as_json)


@app.command()
def cancel(run: Annotated[str, typer.Argument(help="The run.")]) -> None:
    """Stop a run: its model and its tools are told, what it wrote so far stays."""
    settings, folder = settings_here()
    with api_of(folder, settings) as api:
        status = api.cancel(run)["status"]
    ended = status in ("completed", "failed", "cancelled")
    console.print(f"the run is {status}" if ended else "the run is asked to stop", highlight=False)


def ask(api: Api, question: str) -> None:
    """Asks one thing in a session of its own and shows the reply."""
    session = api.create_session("Hello")
    _print(api, Followed(api, api.run(session, question)), session, stop=False, as_json=False)


def _print(api: Api, events: Followed, session: str, *, stop: bool, as_json: bool) -> None:
    try:
        if not as_json:
            show(events, console)
            return
        failed = ""
        for event in events:
            typer.echo(event.text)
            if event["type"] == "run.failed":
                failed = event["data"]["message"]
    except KeyboardInterrupt:
        notes.print()
        _tell(_stopped(api, events.run_id, session) if stop else goes_on(events.run_id, session))
        raise SystemExit(INTERRUPTED) from None
    if failed:
        raise LaunchError(f"the run failed: {failed}")


def goes_on(run_id: str, session: str) -> str:
    """What is true of a run whose reader left, and what to do about it."""
    if not run_id:
        return (
            "left before the mesh answered: it may have the message all the same, "
            f"and hermesh chat --session {session} shows it then"
        )
    return f"the run goes on. To see it: hermesh watch {run_id}. To stop it: hermesh cancel {run_id}"


def _stopped(api: Api, run_id: str, session: str) -> str:
    """Asks for a run to be cancelled, and says what became of that."""
    if not run_id:
        return goes_on(run_id, session)
    try:
        api.cancel(run_id)
    except LaunchError as error:
        return f"it could not be stopped: {error}; {goes_on(run_id, session)}"
    return "stopped"


def _tell(text: str) -> None:
    notes.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def chat(
    session: Annotated[str, typer.Option(help="Resume this session; see hermesh sessions.")] = "",
) -> None:
    """Chat in the terminal; Ctrl-C stops a reply, Ctrl-D leaves."""
    settings, folder = settings_here()
    with api_of(folder, settings) as api:
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
    events = Followed(api, api.run(session, text))
    try:
        show(events, console)
    except KeyboardInterrupt:
        console.print()
        _tell(_stopped(api, events.run_id, session))
    except LaunchError as error:
        _tell(str(error))


@app.command()
def sessions(as_json: Json = False) -> None:
    """List the sessions, last changed first."""
    settings, folder = settings_here()
    with api_of(folder, settings) as api:
        found = api.sessions()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table()
    for name in ("session", "title", "messages", "changed"):
        table.add_column(name, overflow="fold")
    for one in found:
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(one["update_time_ms"]) / 1000))
        table.add_row(one["session_id"], escape(one["title"]), str(one["message_count"]), changed)
    console.print(table)


@app.command()
def actions(as_json: Json = False) -> None:
    """List the tool calls that wait for a person, in all sessions, with the commands that settle them."""
    settings, folder = settings_here()
    with api_of(folder, settings) as api:
        found = api.actions()
    if as_json:
        typer.echo("[" + ",\n ".join(action.text for action in found) + "]")
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
    settings, folder = settings_here()
    with api_of(folder, settings) as api:
        settled = api.resolve(run, full_id(run, call), decision, content)
    console.print(f"{decision}; the run is {settled['status']}", markup=False, highlight=False)
