"""What Envoy answers by itself has the forms and the reasons of our API."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2

from gateway.routes.system import Health
from hermesh.common.v1.error_reason_pb2 import ErrorReason
from launcher import envoy, replies

HEALTHY, *MAPPERS = json.loads(replies.http_config())["mappers"]
GRPC_MAPPERS = json.loads(replies.grpc_config())["mappers"]


def headers_of(mapper: dict[str, Any]) -> dict[str, str]:
    return {item["header"]["key"]: item["header"]["value"] for item in mapper["headers_to_add"]}


@pytest.mark.parametrize("reply", [*replies.http_replies(), *replies.grpc_replies()])
def test_every_reason_is_a_documented_one(reply: replies.Reply) -> None:
    assert ErrorReason.Value(f"ERROR_REASON_{reply.error.reason}")
    assert "%" not in reply.error.message


def test_the_last_reply_of_each_list_takes_what_is_left() -> None:
    for found in (replies.http_replies(), replies.grpc_replies()):
        assert found[-1].when["status_code_filter"]["comparison"]["op"] == "GE"
        assert found[-1].when["status_code_filter"]["comparison"]["value"]["default_value"] == 400


def test_a_healthy_envoy_says_what_a_healthy_gateway_says() -> None:
    assert HEALTHY["body_format_override"]["json_format"] == Health(status="ok").model_dump()
    assert headers_of(HEALTHY)["x-request-id"] == replies.REQUEST_ID


@pytest.mark.parametrize("mapper", MAPPERS)
def test_an_http_reply_is_a_problem_or_openais_object(mapper: dict[str, Any]) -> None:
    body = mapper["body_format_override"]
    document = body["json_format"]
    if body["content_type"] == "application/json":
        assert set(document["error"]) == {"message", "type", "param", "code"}
    else:
        assert set(document) == {"type", "title", "status", "detail", "reason", "request_id"}
        assert document["status"] == mapper["status_code"]
    assert headers_of(mapper)["x-request-id"] == replies.REQUEST_ID


def test_each_http_reply_is_there_in_both_forms() -> None:
    forms = [mapper["body_format_override"]["content_type"] for mapper in MAPPERS]
    assert forms == ["application/json", "application/problem+json"] * len(replies.http_replies())


@pytest.mark.parametrize("mapper", GRPC_MAPPERS)
def test_a_grpc_reply_carries_its_reason(mapper: dict[str, Any]) -> None:
    headers = headers_of(mapper)
    encoded = headers["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
    assert str(status.code) == headers["grpc-status"]
    assert status.message == mapper["body_format_override"]["text_format_source"]["inline_string"]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "hermesh"


@pytest.mark.parametrize(
    ("wanted", "files", "most"),
    [(10_000, 65_536, 10_000), (10_000, 4096, 1792), (50, 65_536, 50), (900, 100, 64), (9, -1, 9)],
)
def test_no_more_connections_are_taken_than_files_can_be_open(wanted: int, files: int, most: int) -> None:
    assert envoy.connections(wanted, files) == most
