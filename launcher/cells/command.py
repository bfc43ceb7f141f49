"""The commands `hermesh cells ...`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from launcher import envoy
from launcher.cells import edge, table
from launcher.common import console
from launcher.errors import LaunchError
from meshkit.api_keys import is_tag, make_key

app = typer.Typer(
    no_args_is_help=True, help="Runs several meshes behind one edge, and moves tenants between them."
)

File = Annotated[
    Path,
    typer.Option("--cells", help="The cells' file.", envvar="HERMESH_CELLS_FILE", show_default=table.FILE),
]
Tenant = Annotated[str, typer.Argument(help="A tenant's name, which is its keys' tag.")]
_DEFAULT = Path(table.FILE)


@app.command("render")
def render_command(file: File = _DEFAULT) -> None:
    """Write what the edge's Envoys read; after a change of the cells' file, too."""
    cells = table.read(file)
    edge.write(cells, cells.table())
    for folder in cells.folders:
        envoy.validate(folder / edge.CONFIG)
        console.print(f"The edge's Envoy reads {folder / edge.CONFIG}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    file: File = _DEFAULT,
    folder: Annotated[Path | None, typer.Option(help="Which of its folders; the first by default.")] = None,
) -> None:
    """Serve as the edge, in the foreground, until SIGTERM."""
    cells = table.read(file)
    edge.write(cells, cells.table())
    chosen = cells.folders[0] if folder is None else folder.absolute()
    if chosen not in cells.folders:
        raise LaunchError(f"{chosen} is none of the edge's folders in {file}")
    line = envoy.command(chosen / edge.CONFIG)
    os.execv(line[0], line)  # noqa: S606 - no shell is wanted


@app.command("list")
def list_command(file: File = _DEFAULT) -> None:
    """Show the cells and who was placed where."""
    cells = table.read(file)
    placed = cells.table()
    for cell in cells.cells.values():
        tenants = sorted(tag for tag, name in placed.items() if name == cell.name)
        also = ", and whoever is placed nowhere" if cell.name == cells.default else ""
        console.print(
            f"{cell.name}  http {' '.join(cell.http)}  grpc {' '.join(cell.grpc)}  "
            f"tenants: {', '.join(tenants) or 'none'}{also}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def key(tenant: Tenant) -> None:
    """Print a new API key that carries a tenant's tag; nothing knows it yet."""
    _check(tenant)
    typer.echo(make_key(tenant))


@app.command()
def move(
    tenant: Tenant,
    to: Annotated[str, typer.Option("--to", help="The cell that is to have it.")],
    file: File = _DEFAULT,
    abort: Annotated[bool, typer.Option("--abort", help="Take back a move that has not switched.")] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Delete what the former cell has of a tenant that was moved.")
    ] = False,
) -> None:
    """Move a tenant to another cell while it works; begun again, a move goes on where it was broken off."""
    from launcher.cells import move as moving

    _check(tenant)
    cells = table.read(file)
    if abort and forget:
        raise LaunchError(
            "--abort takes back what has not happened, --forget ends what has: name one of them"
        )
    if abort:
        asyncio.run(moving.abort(cells, tenant, to, _say))
        console.print(f"Taken back: {cells.where(tenant).name} serves {tenant}.", highlight=False)
        return
    if forget:
        number = asyncio.run(moving.forget(cells, tenant, to, _say))
        console.print(f"Deleted the former copy: {number} sessions.", highlight=False)
        return
    done = asyncio.run(moving.move(cells, tenant, to, _say))
    console.print(f"{to} serves {tenant}.", highlight=False)
    console.print(
        f"  {done.sessions[0]} sessions copied while it worked, {done.sessions[1]} while it was frozen, "
        f"{done.results} large results; {done.runs} runs go on in {to}",
        highlight=False,
        soft_wrap=True,
    )
    if done.pause_seconds:
        console.print(f"  it was frozen for {done.pause_seconds:.2f} s", highlight=False)


@app.command()
def assign(
    tenant: Tenant,
    to: Annotated[str, typer.Option("--to", help="The cell that is to have it.")],
    file: File = _DEFAULT,
) -> None:
    """Say where a new tenant is, before it is made there; one that has data is moved instead."""
    from launcher.cells import move as moving

    _check(tenant)
    cells = table.read(file)
    asyncio.run(moving.check_new(cells, tenant, to))
    edge.write(cells, {**cells.table(), tenant: to})
    console.print(f"Requests with {tenant}'s keys go to {to}.", highlight=False)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _check(tenant: str) -> None:
    if not is_tag(tenant):
        raise LaunchError(
            f"{tenant!r} cannot be a key's tag: a to z, 0 to 9 and dashes, 32 at most, no dash first"
        )
