"""The tool service's settings."""

from __future__ import annotations

from pydantic import Field

from meshkit.settings import MeshSettings


class ToolSettings(MeshSettings):
    """What the tool service reads from its environment."""

    object_store_url: str = Field(
        "",
        description="Where tool results above 64 KiB go: file:///folder or s3://bucket/prefix; "
        "if empty they are cut.",
    )
    tool_modules: str = Field(
        "", description="Python modules with tools of your own, separated by commas; see docs/tools.md."
    )
    tool_disabled: str = Field(
        "", description="Tools that are not offered, by name, separated by commas; for example fetch_page."
    )
    tool_approval: str = Field(
        "",
        description="Tools whose calls a person has to approve, by name, separated by commas, beside those "
        "that declare it; -name takes a declared one out.",
    )
    tool_fetch_allow: str = Field(
        "",
        description="host:port pairs, separated by commas, that fetch_page may read although their address "
        "is private.",
    )
    tool_max_calls: int = Field(64, ge=1, le=10_000, description="Most tool calls at once in one replica.")
    tool_complete_seconds: float = Field(
        60.0,
        ge=0,
        le=600,
        description="How long a replica tries to record the outcome of a tool that has acted, and to store a "
        "large result.",
    )


def split(text: str) -> list[str]:
    """Returns the parts of a list that is separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]
