"""A run that is silent says what it waits for."""

import threading
from collections.abc import Iterator

import pytest

from launcher import patience
from launcher.patience import explained

SECONDS = 20.0


def test_a_silence_is_explained_once_and_events_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.01)
    said: list[str] = []
    told = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    def events() -> Iterator[dict[str, object]]:
        yield {"seq": 1}
        for seq in (2, 3):
            assert told.wait(SECONDS)
            told.clear()
            yield {"seq": seq}

    assert [event["seq"] for event in explained(events(), lambda: "no agent answers", say)] == [1, 2, 3]
    # Not again while the same silence lasts, and again with the next.
    assert said == ["no agent answers"] * 2
    assert not [thread for thread in threading.enumerate() if thread.name == "patience"]


def test_what_is_not_known_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.01)
    asked = threading.Event()

    def problem() -> str:
        asked.set()
        return ""

    def events() -> Iterator[dict[str, object]]:
        assert asked.wait(SECONDS)
        yield {"seq": 1}

    assert list(explained(events(), problem, pytest.fail)) == [{"seq": 1}]


def test_a_failure_ends_the_thread_too() -> None:
    def events() -> Iterator[dict[str, object]]:
        yield {"seq": 1}
        raise ValueError("the end")

    with pytest.raises(ValueError, match="the end"):
        list(explained(events(), lambda: "", pytest.fail))
    assert not [thread for thread in threading.enumerate() if thread.name == "patience"]
