"""The OpenAPI document against itself and what is really answered, by the FAKE of tests/fakes/mesh.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from gateway import openapi
from gateway.app import api_endpoints


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return openapi.document(api_endpoints(), "1")


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from refs(item)
    elif isinstance(value, list):
        for item in value:
            yield from refs(item)


def operations(spec: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_reference_leads_somewhere(spec: dict[str, Any]) -> None:
    found = set(refs(spec))
    assert found
    for ref in found:
        assert ref.rpartition("/")[2] in spec["components"]["schemas"], ref


def test_every_schema_is_a_schema(spec: dict[str, Any]) -> None:
    for schema in spec["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


def test_operations_are_whole_and_their_ids_unique(spec: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(spec)]
    assert len(ids) == len(set(ids))
    for path, _, operation in operations(spec):
        declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", path))
        assert operation["summary"]
        assert "default" in operation["responses"]


def test_only_probes_and_the_page_need_no_key(spec: dict[str, Any]) -> None:
    open_ = {path for path, _, operation in operations(spec) if operation.get("security") == []}
    assert open_ == {"/health", "/ready", "/metrics", "/auth/login", "/auth/logout", "/auth/session"}


async def test_answers_are_what_the_document_says(served: Any, spec: dict[str, Any]) -> None:
    def check(path: str, method: str, answer: Any) -> Any:
        responses = spec["paths"][path][method]["responses"]
        response = responses.get(str(answer.status_code)) or responses["default"]
        media_type = answer.headers["content-type"].partition(";")[0]
        schema = {**response["content"][media_type]["schema"], "components": spec["components"]}
        jsonschema_rs.validate(schema, answer.json())
        return answer.json()

    client = served.client
    made = check("/v1/sessions", "post", await client.post("/v1/sessions", json={"title": "t"}))
    session = f"/v1/sessions/{made['session_id']}"
    check("/v1/sessions", "get", await client.get("/v1/sessions"))
    check("/v1/sessions/{session_id}", "get", await client.get(session))
    check("/v1/sessions/{session_id}", "patch", await client.patch(session, json={"title": "u"}))
    run = check(
        "/v1/sessions/{session_id}/runs", "post", await client.post(f"{session}/runs", json={"input": "a"})
    )
    await client.get(f"/v1/runs/{run['run_id']}/events")
    check("/v1/sessions/{session_id}/runs", "get", await client.get(f"{session}/runs"))
    check("/v1/sessions/{session_id}/messages", "get", await client.get(f"{session}/messages"))
    check("/v1/runs/{run_id}", "get", await client.get(f"/v1/runs/{run['run_id']}"))
    check("/v1/runs/{run_id}/cancel", "post", await client.post(f"/v1/runs/{run['run_id']}/cancel"))
    check("/v1/runs/{run_id}", "get", await client.get("/v1/runs/none"))
    check("/v1/sessions", "post", await client.post("/v1/sessions", json={"title": 7}))
    check("/v1/models", "get", await client.get("/v1/models"))
    chat = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}
    check("/v1/chat/completions", "post", await client.post("/v1/chat/completions", json=chat))
    check("/v1/chat/completions", "post", await client.post("/v1/chat/completions", json={}))
    check("/health", "get", await client.get("/health"))
    check("/ready", "get", await client.get("/ready"))
    assert (await client.get("/openapi.json")).json()["paths"].keys() == spec["paths"].keys()


def test_the_page_escapes_what_it_shows() -> None:
    spec = openapi.document(api_endpoints(), "1")
    spec["paths"]["/v1/sessions"]["get"]["summary"] = "<script>alert(1)</script>"
    page = openapi.page(spec)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
