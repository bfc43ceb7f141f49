"""Probes and metrics."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway.context import Gateway
from gateway.endpoints import Answer, Endpoint, json_response
from meshkit.telemetry import render_metrics

_NO_STORE = {"cache-control": "no-store"}


class Health(BaseModel):
    """Whether this process serves."""

    status: Literal["ok", "draining"]


class Ready(BaseModel):
    """Whether the mesh behind answers."""

    status: Literal["ready", "degraded", "draining"]
    checks: dict[str, str]


async def health(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /health: a balancer takes a draining gateway out by it."""
    if gateway.hub.leaving:
        return json_response({"status": "draining"}, 503, _NO_STORE)
    return json_response({"status": "ok"}, 200, _NO_STORE)


async def ready(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /ready: asks the services through the mesh.

    What does not answer is shared by all gateways. A balancer that took them all out would put its own words
    in the place of the problem document that says what is wrong and when to come back.
    """
    problems = await gateway.readiness.soon()
    checks = {name: why or "ok" for name, why in problems.items()}
    degraded = any(why is not None for why in problems.values())
    if gateway.hub.leaving:
        status, code = "draining", 503
    else:
        status, code = ("degraded", 200) if degraded else ("ready", 200)
    return json_response({"status": status, "checks": checks}, code, _NO_STORE)


async def metrics(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /metrics."""
    body, media_type = render_metrics()
    return Response(body, media_type=media_type, headers=_NO_STORE)


endpoints = [
    Endpoint(
        "GET",
        "/health",
        health,
        "Tells whether this gateway serves",
        {200: Answer("It does.", Health), 503: Answer("It is about to stop.", Health)},
        tag="system",
        public=True,
    ),
    Endpoint(
        "GET",
        "/ready",
        ready,
        "Tells whether the mesh behind this gateway answers",
        {
            200: Answer("It does, or `degraded` and what does not; this gateway serves.", Ready),
            503: Answer("This gateway is about to stop.", Ready),
        },
        tag="system",
        public=True,
    ),
    Endpoint(
        "GET",
        "/metrics",
        metrics,
        "Prometheus figures of this gateway",
        {200: Answer("The figures.", media_type="text/plain")},
        tag="system",
        public=True,
    ),
]
