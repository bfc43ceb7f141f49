from datetime import UTC, datetime, tzinfo

import pytest

from services.tool.builtin.current_time import describe
from services.tool.registry import ToolError


def at(year: int, month: int, day: int, hour: int = 12) -> object:
    def now(zone: tzinfo) -> datetime:
        return datetime(year, month, day, hour, tzinfo=UTC).astimezone(zone)

    return now


def test_the_time_is_that_of_the_zone_with_its_summer_time() -> None:
    winter = describe("Europe/Berlin", at(2026, 1, 15))  # type: ignore[arg-type]
    summer = describe("Europe/Berlin", at(2026, 7, 15))  # type: ignore[arg-type]
    assert (winter["iso"], winter["utc_offset"], winter["abbreviation"]) == (
        "2026-01-15T13:00:00+01:00",
        "+01:00",
        "CET",
    )
    assert (summer["time"], summer["utc_offset"], summer["weekday"]) == ("14:00:00", "+02:00", "Wednesday")
    assert winter["unix"] == 1768478400


@pytest.mark.parametrize("zone", ["europe/berlin", " Europe/Berlin ", "EUROPE/BERLIN"])
def test_case_and_space_do_not_matter(zone: str) -> None:
    assert describe(zone)["zone"] == "Europe/Berlin"


def test_half_hours_west_are_written_right() -> None:
    assert describe("America/St_Johns", at(2026, 1, 15))["utc_offset"] == "-03:30"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("zone", "hint"),
    [
        ("Tokyo", "Asia/Tokyo"),
        ("new york", "America/New_York"),
        ("Europe/Berln", "Europe/Berlin"),
        ("qqqqq", "an IANA name"),
        ("../../etc/passwd", "an IANA name"),
        ("/etc/localtime", "there is no time zone"),
        ("Europe", "there is no time zone"),
        ("a\x00b", "an IANA name"),
        ("", "an IANA name"),
    ],
)
def test_an_unknown_zone_says_what_to_use(zone: str, hint: str) -> None:
    with pytest.raises(ToolError) as caught:
        describe(zone)
    assert hint in caught.value.message
    assert caught.value.reason == "TOOL_ARGUMENTS_INVALID"
