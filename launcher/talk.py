"""Showing a run in the terminal as it happens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console

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
                console.print(f"[dim]calling {data['name']} ...[/dim]")
            case "tool.result":
                console.print(f"[dim]{data['status']}: {str(data['content'])[:200]}[/dim]", highlight=False)
            case "action.required":
                console.print(f"[yellow]{data.get('name')} waits for a decision: {data['call_id']}[/yellow]")
            case "context.degraded":
                console.print(f"[dim]without {data['part']}: {data.get('detail', '')}[/dim]")
            case "run.failed":
                console.print()
                raise LaunchError(f"the run failed: {data['message']} ({data['reason']})")
            case "run.cancelled":
                console.print("\n[dim]cancelled[/dim]")
            case "run.completed":
                console.print()
