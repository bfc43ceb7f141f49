"""The OpenAPI document and a page that shows it, both made from the routes' own declarations."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from gateway.endpoints import Endpoint

_PARAM = re.compile(r"{(\w+)(:\w+)?}")
_TAGS = {
    "sessions": "Sessions and their messages.",
    "runs": "Input, and what is done to answer it.",
    "events": "The event log over SSE; every type is described in docs/events.md.",
    "openai": "OpenAI-compatible routes, with OpenAI's error object.",
    "page": "The chat page's sign-in.",
    "system": "For operators.",
}


class Violation(BaseModel):
    """One wrong field."""

    field: str
    description: str


class Problem(BaseModel):
    """An error (RFC 9457). Branch on `reason`."""

    type: str
    title: str
    status: int
    detail: str = Field(description="For a person.")
    reason: str = Field(description="For programs: a value of hermesh.common.v1.ErrorReason.")
    request_id: str = Field(description="Finds the request in the logs.")
    metadata: dict[str, str] = Field(default_factory=dict, description="Facts about the error.")
    violations: list[Violation] = Field(default_factory=list, description="Wrong fields.")


class OpenAIErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorResponse(BaseModel):
    """An error of an OpenAI-compatible route."""

    error: OpenAIErrorBody


def document(endpoints: Sequence[Endpoint], version: str) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document of some endpoints."""
    bodies: set[type[BaseModel]] = {Problem, OpenAIErrorResponse}
    for endpoint in endpoints:
        bodies.update(answer.model for answer in endpoint.answers.values() if answer.model is not None)
        if endpoint.body is not None:
            bodies.add(endpoint.body)
    ordered = sorted(bodies, key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(model, "validation") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = _PARAM.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Hermesh",
            "version": version,
            "summary": "Sessions, runs and their event log, over HTTP.",
            "description": "Events can also be had over WebSocket: GET /v1/sessions/{session_id}/ws.",
        },
        "servers": [{"url": "/"}],
        "security": [{"apiKey": []}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": "An API key, hm_..."}
            },
        },
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(endpoint),
        "summary": endpoint.summary,
        "tags": [endpoint.tag],
    }
    if endpoint.description:
        operation["description"] = endpoint.description
    if endpoint.public:
        operation["security"] = []
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name, _ in _PARAM.findall(endpoint.path)
    ]
    parameters += [
        {
            "name": param.name,
            "in": param.place,
            "required": param.required,
            "description": param.description,
            "schema": {"type": param.kind},
        }
        for param in endpoint.params
    ]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": _ref(endpoint.body)}}}
        if any(field.is_required() for field in endpoint.body.model_fields.values()):
            operation["requestBody"]["required"] = True
    responses: dict[str, Any] = {}
    for status, answer in endpoint.answers.items():
        responses[str(status)] = {"description": answer.description}
        if answer.model is not None:
            responses[str(status)]["content"] = {"application/json": {"schema": _ref(answer.model)}}
        elif answer.media_type is not None:
            # A stream of events has no schema in OpenAPI 3.1; docs/events.md has each event's.
            stream = answer.media_type == "text/event-stream"
            responses[str(status)]["content"] = {
                answer.media_type: {} if stream else {"schema": {"type": "string"}}
            }
    openai = endpoint.errors == "openai"
    media_type = "application/json" if openai else "application/problem+json"
    responses["default"] = {
        "description": "An error.",
        "content": {media_type: {"schema": _ref(OpenAIErrorResponse if openai else Problem)}},
    }
    operation["responses"] = responses
    return operation


def _operation_id(endpoint: Endpoint) -> str:
    words = [word for word in re.split(r"[^a-z0-9]+", _PARAM.sub("", endpoint.path).lower()) if word]
    by = ["by"] if endpoint.path.endswith("}") else []
    return "_".join([endpoint.method.lower(), *words[1 if words[:1] == ["v1"] else 0 :], *by])


def page(spec: dict[str, Any]) -> str:
    """Returns a plain HTML page of the document, without any script or foreign asset."""
    sections: list[str] = []
    for tag in spec["tags"]:
        rows = [
            _entry(method, path, operation)
            for path, methods in spec["paths"].items()
            for method, operation in methods.items()
            if tag["name"] in operation["tags"]
        ]
        if rows:
            sections.append(
                f"<h2>{html.escape(tag['name'])}</h2><p>{html.escape(tag['description'])}</p>{''.join(rows)}"
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Hermesh HTTP API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="/favicon.svg"><link rel="stylesheet" href="/app.css"></head>'
        '<body class="docs"><main>'
        "<h1>Hermesh HTTP API</h1><p>The same as <a href='/openapi.json'>openapi.json</a>. "
        "Send <code>Authorization: Bearer &lt;key&gt;</code>.</p>"
        + "".join(sections)
        + "</main></body></html>"
    )


def _entry(method: str, path: str, operation: dict[str, Any]) -> str:
    head = f"<b>{html.escape(method.upper())}</b> <code>{html.escape(path)}</code>"
    parts = [f"<details><summary>{head} {html.escape(operation['summary'])}</summary>"]
    if "description" in operation:
        parts.append(f"<p>{html.escape(operation['description'])}</p>")
    if "parameters" in operation:
        items = "".join(
            f"<li><code>{html.escape(item['name'])}</code> ({item['in']}) "
            f"{html.escape(item.get('description', ''))}</li>"
            for item in operation["parameters"]
        )
        parts.append(f"<p>Parameters</p><ul>{items}</ul>")
    if "requestBody" in operation:
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        parts.append(f"<p>Body: <code>{html.escape(name)}</code></p>")
    answers = "".join(
        f"<li><code>{status}</code> {html.escape(answer['description'])}</li>"
        for status, answer in operation["responses"].items()
    )
    parts.append(f"<p>Answers</p><ul>{answers}</ul></details>")
    return "".join(parts)
