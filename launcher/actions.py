"""Tool calls that wait for a person, as the terminal shows them: what each waits for, and what settles it."""

from __future__ import annotations

import json
import time
from typing import Any

DECISIONS = ("completed", "failed", "retry", "abandon", "approve", "deny")
_OF_KIND = {"approval": ("approve", "deny"), "unknown": ("completed", "failed", "retry")}


def short_id(run_id: str, call_id: str) -> str:
    """Returns a call's id without its run's, which the command has anyway."""
    return call_id.removeprefix(f"{run_id}:")


def full_id(run_id: str, call: str) -> str:
    """Returns a call's id, from either form."""
    return call if call.startswith(f"{run_id}:") else f"{run_id}:{call}"


def question(action: dict[str, Any]) -> str:
    """Returns what is asked about a call."""
    # As the model wrote it, to the letter: that is what runs.
    arguments = action.get("arguments_text") or json.dumps(action.get("arguments") or {}, ensure_ascii=False)
    called = f"{action['name']} {arguments}"
    if action.get("kind") == "approval":
        return f"{called} needs approval: shall it run?"
    return f"{called}: it is not known whether it took effect, and it is not repeated by itself"


def commands(run_id: str, call_id: str, kind: str) -> list[str]:
    """Returns the commands that settle a call, each with what it means."""
    call = short_id(run_id, call_id)
    return [
        f"hermesh resolve {run_id} {call} {decision}" for decision in (*_OF_KIND[_known(kind)], "abandon")
    ]


def _known(kind: str) -> str:
    return kind if kind in _OF_KIND else "unknown"


def lines(action: dict[str, Any], now: float) -> list[str]:
    """Returns an action of `GET /v1/actions` as lines of text.

    Args:
        action: as the API has it.
        now: Unix time in seconds.
    """
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(action["waiting_since_ms"] / 1000))
    hours, rest = divmod(max(0, int(now - action["waiting_since_ms"] / 1000)), 3600)
    shown = [
        question(action),
        f"  waits since {since} ({hours} h {rest // 60} min), session {action['session_id']}",
    ]
    if action["may_act_ms"]:
        shown.append(f"  an earlier try may still act for {action['may_act_ms'] / 1000:.0f} s")
    return shown + [f"  {line}" for line in commands(action["run_id"], action["call_id"], action["kind"])]
