from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from gateway.frames import event_json, reconnect_sse, sse
from hermesh.common.v1.event_pb2 import Event

RUN = "01890000-0000-7000-8000-00000000000a"


def parse(stream: bytes) -> list[dict[str, str]]:
    """Reads SSE as the standard says: line breaks are LF, CR and CRLF."""
    frames = []
    for block in stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            frames.append(fields)
    return frames


def test_a_frame_is_exactly_this() -> None:
    event = Event(run_id=RUN, seq=3, type="text.delta", time_ms=17, data='{"text":"hé"}')
    assert sse([event]).decode() == (
        f"id: {RUN}:3\nevent: text.delta\n"
        f'data: {{"run_id":"{RUN}","seq":3,"type":"text.delta","time":17,"data":{{"text":"hé"}}}}\n\n'
    )


@given(
    st.lists(
        st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.lists(st.text()))), max_size=5
    ),
    st.sampled_from([None, 1]),
)
def test_frames_read_back_as_what_was_stored(bodies: list[dict[str, object]], indent: int | None) -> None:
    """Also when a writer's JSON has line breaks between its tokens."""
    events = [
        Event(
            run_id=RUN,
            seq=n,
            type="text.delta",
            time_ms=n,
            data=json.dumps(body, indent=indent, ensure_ascii=False),
        )
        for n, body in enumerate(bodies, 1)
    ]
    frames = parse(sse(events))
    assert [frame["id"] for frame in frames] == [f"{RUN}:{n}" for n in range(1, len(bodies) + 1)]
    assert [json.loads(frame["data"])["data"] for frame in frames] == bodies


def test_the_websocket_form_is_the_data_of_the_frame() -> None:
    event = Event(run_id=RUN, seq=1, type="usage", time_ms=1, data='{"input_tokens":1}')
    assert parse(sse([event]))[0]["data"] == event_json(event)


def test_an_event_without_a_body_has_an_empty_object() -> None:
    assert json.loads(event_json(Event(run_id=RUN, seq=1, type="step.started")))["data"] == {}


def test_reconnect_has_no_id_so_that_the_cursor_stays() -> None:
    frame = parse(reconnect_sse("drain", 250))[0]
    assert "id" not in frame
    assert frame["event"] == "reconnect"
    assert json.loads(frame["data"]) == {"reason": "drain", "after_ms": 250}
    assert frame["retry"] == "250"
