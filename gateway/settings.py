"""Settings of the gateway."""

from __future__ import annotations

from pydantic import Field

from meshkit.settings import MeshSettings


class GatewaySettings(MeshSettings):
    """What the gateway reads from its environment, as HERMESH_<NAME>."""

    heartbeat_seconds: float = Field(
        15.0, gt=0, le=300, description="Silence after which an open event stream gets a heartbeat comment."
    )
    write_timeout_seconds: float = Field(
        20.0,
        gt=0,
        le=600,
        description="How long a client of an event stream may take nothing before it is dropped.",
    )
    body_timeout_seconds: float = Field(
        30.0,
        gt=0,
        le=600,
        description=(
            "Longest time in seconds that a request's body may take to arrive; Envoy waits for a request "
            "for 60 s at most."
        ),
    )
    follow_timeout_seconds: float = Field(
        30.0,
        gt=0,
        le=600,
        description="How long the gateway itself looks for a replica that goes on with a broken stream.",
    )
    max_streams: int = Field(
        2_000, ge=1, description="Event streams of one gateway, clients that left mid-run included."
    )
    line_seconds: float = Field(
        2.0,
        gt=0,
        le=600,
        description=(
            "How long a new run waits in line for its turn to be accepted, seconds; then it is refused with "
            "OVERLOADED. 32 are being accepted at once, 512 may wait."
        ),
    )
    max_waiting_streams: int = Field(
        64,
        ge=0,
        description=(
            "Event streams of one gateway whose new run was queued because all agents were full, and did not "
            "begin yet; while there are so many, new runs with a stream are refused instead of queued."
        ),
    )
    login_seconds: int = Field(
        7 * 24 * 3600, ge=60, description="How long a sign-in at the chat page lasts, in seconds."
    )
