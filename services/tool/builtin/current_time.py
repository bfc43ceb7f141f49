"""The tool `current_time`: what a clock on the wall of a place shows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, tzinfo
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from services.tool.registry import Effect, ToolContext, ToolError, tool


@tool(
    "current_time",
    description=(
        "Returns the current date and time in a time zone. Use it whenever the answer depends on the present "
        "date, time or weekday."
    ),
    input_schema={
        "type": "object",
        "properties": {
            "zone": {
                "type": "string",
                "description": "IANA time zone, for example Europe/Berlin or America/New_York. Default: UTC.",
                "maxLength": 100,
            }
        },
        "additionalProperties": False,
    },
    effect=Effect.PURE,
    timeout=2.0,
)
async def current_time(arguments: Mapping[str, Any], context: ToolContext) -> dict[str, Any]:
    """Runs the tool."""
    return describe(str(arguments.get("zone") or "UTC"))


def describe(zone: str, now: Callable[[tzinfo], datetime] = datetime.now) -> dict[str, Any]:
    """Returns the present moment in a zone.

    Returns:
        `zone`, `iso` (to the second, with offset), `date`, `time`, `weekday`, `utc_offset`, `abbreviation`
        and `unix` (seconds).

    Raises:
        ToolError: There is no such zone; the message names the nearest ones.
    """
    place = _zone(zone.strip())
    moment = now(UTC).astimezone(place)
    offset = moment.strftime("%z")
    return {
        "zone": place.key,
        "iso": moment.isoformat(timespec="seconds"),
        "date": moment.strftime("%Y-%m-%d"),
        "time": moment.strftime("%H:%M:%S"),
        "weekday": _WEEKDAYS[moment.weekday()],
        "utc_offset": f"{offset[:3]}:{offset[3:5]}",
        "abbreviation": moment.tzname(),
        "unix": int(moment.timestamp()),
    }


# Not strftime("%A"): that speaks the process's locale.
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _zone(name: str) -> ZoneInfo:
    zones = _zones()
    exact = zones.get(name.casefold())
    if exact is not None:
        return ZoneInfo(exact)
    # A city alone is what people say: "Tokyo" for Asia/Tokyo.
    city = name.casefold().replace(" ", "_")
    cities = sorted(full for lower, full in zones.items() if lower.rpartition("/")[2] == city)
    near = cities or [
        zones[key] for key in difflib.get_close_matches(name.casefold(), list(zones), n=3, cutoff=0.6)
    ]
    hint = f"; did you mean {', '.join(near[:3])}?" if near else "; use an IANA name such as Europe/Berlin"
    raise ToolError(f"there is no time zone {name!r}{hint}", reason="TOOL_ARGUMENTS_INVALID")


@cache
def _zones() -> dict[str, str]:
    # Only names of the database reach ZoneInfo, so no text of a caller ever becomes a path.
    return {name.casefold(): name for name in available_timezones()}
