"""Showing a run in the terminal as it happens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape

from launcher.actions import commands, question
from launcher.errors import LaunchError


def show(events: Iterable[dict[str, Any]], console: Console) -> None:
    """Prints a run's text as it comes, and what a person should know beside it.

    Raises:
        LaunchError: The run failed; the message says why.
    """
    for event in events:
        data = event["data"]
        match event["type"]:
            case "text.delta":
                console.print(data["text"], end="", markup=False, highlight=False, soft_wrap=True)
            case "attempt.reset":
                console.print("\n[dim]the replica that wrote this was lost; the answer starts again:[/dim]")
            case "tool.call":
                console.print(f"[dim]calling {escape(data['name'])} ...[/dim]")
            case "tool.result":
                text = escape(str(data["content"])[:200])
                console.print(f"[dim]{data['status']}: {text}[/dim]", highlight=False)
            case "action.required":
                _ask(event["run_id"], data, console)
            case "action.resolved":
                console.print(f"[dim]decided: {data['decision']}[/dim]")
            case "tool.reconciled":
                console.print(f"[dim]looked up what became of it: {data['finding']}[/dim]")
            case "context.degraded":
                console.print(f"[dim]without {data['part']}: {escape(data.get('detail', ''))}[/dim]")
            case "run.failed":
                console.print()
                raise LaunchError(f"the run failed: {data['message']} ({data['reason']})")
            case "run.cancelled":
                console.print("\n[dim]cancelled[/dim]")
            case "run.completed":
                console.print()


def _ask(run_id: str, action: dict[str, Any], console: Console) -> None:
    """Says what a person has to decide, and the commands for it; the run waits for days if need be."""
    console.print(question(action), style="yellow", markup=False, highlight=False, soft_wrap=True)
    for command in commands(run_id, action["call_id"], action.get("kind", "")):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
