"""docs/events.md and docs/http-api.md hold what the code holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

from gateway.app import api_endpoints

ROOT = Path(__file__).resolve().parents[3]
EVENTS = (ROOT / "docs" / "events.md").read_text()
API = (ROOT / "docs" / "http-api.md").read_text()
EXAMPLE = re.compile(r"^`([a-z]+\.?[a-z]*)`:.*?\n```json\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def test_every_event_type_of_the_protos_has_an_example_that_is_an_object() -> None:
    proto = (ROOT / "protos" / "hermesh" / "common" / "v1" / "event.proto").read_text()
    comment = proto[proto.index("// What happened:") : proto.index("string type = 3")]
    types = set(re.findall(r"`([a-z.]+)`", comment))
    examples = {kind: json.loads(body) for kind, body in EXAMPLE.findall(EVENTS)}
    assert set(examples) == types
    assert all(isinstance(body, dict) and body for body in examples.values())


def test_the_page_knows_every_event_type() -> None:
    script = (ROOT / "gateway" / "web" / "fold.js").read_text()
    for kind, _ in EXAMPLE.findall(EVENTS):
        assert f'"{kind}"' in script


def test_every_route_of_the_api_is_described() -> None:
    for endpoint in api_endpoints():
        path = re.sub(r"{(session_id|run_id)}", "{id}", endpoint.path)
        if not path.startswith(("/auth/session", "/auth/logout", "/v1/models/")):
            assert f"{path}`" in API or f"{path} " in API, path
