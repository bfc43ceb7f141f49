"""What somebody else wrote is shown as it is: it is no markup of the terminal's."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from launcher import conversation
from launcher.talk import show

CLOSING = "[/b] [red]x [/dim] \\"


def event(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "run_id": "r", "seq": 1, "data": data}


@pytest.mark.parametrize(
    "shown",
    [
        event("tool.call", name=CLOSING, call_id="c", arguments={}),
        event("tool.result", status="completed", content=CLOSING),
        event("context.degraded", part="memory", detail=CLOSING),
    ],
)
def test_what_a_run_tells_is_no_markup(shown: dict[str, Any]) -> None:
    out = io.StringIO()
    show([shown], Console(file=out, width=200))
    assert CLOSING in out.getvalue()


def test_a_title_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API is a fake one."""

    class Listed:
        def __enter__(self) -> Listed:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def sessions(self) -> list[dict[str, Any]]:
            return [{"session_id": "s", "title": CLOSING, "message_count": 1, "update_time_ms": 0}]

    out = io.StringIO()
    monkeypatch.setattr(conversation, "console", Console(file=out, width=200))
    monkeypatch.setattr(conversation, "settings_here", lambda: (None, None))
    monkeypatch.setattr(conversation, "api_of", lambda *_: Listed())
    conversation.sessions()
    assert CLOSING in out.getvalue()
