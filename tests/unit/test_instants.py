"""Instants as an operator writes them."""

from datetime import UTC, datetime, timedelta

import pytest

from service.core.instants import parse_instant

NOW = datetime(2026, 11, 28, 20, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("2026-12-31T01:00:00Z", datetime(2026, 12, 31, 1, tzinfo=UTC)),
        ("2026-12-31t01:00:00z", datetime(2026, 12, 31, 1, tzinfo=UTC)),
        ("2026-12-31T01:00:00+02:00", datetime(2026, 12, 30, 23, tzinfo=UTC)),
        ("2026-12-31", datetime(2026, 12, 31, tzinfo=UTC)),
        ("1h", NOW + timedelta(hours=1)),
        ("+1h", NOW + timedelta(hours=1)),
        ("-1d", NOW - timedelta(days=1)),
        (" -90s ", NOW - timedelta(seconds=90)),
        ("0s", NOW),
    ],
)
def test_an_instant_is_absolute_or_counted_from_now(text, read_as):
    assert parse_instant(text, now=NOW) == read_as


@pytest.mark.parametrize(
    "text",
    [
        *("", "yesterday", "2026-12-31T01:00:00", "2026-13-01", "2026-12-31T25:00:00Z", "20261231"),
        *("1", "-1", "--1h", "-+1h", "1h30m", "-99999999d", "0001-01-01T00:00:00+14:00", "T"),
    ],
)
def test_what_is_no_instant_is_refused_with_what_is_accepted(text):
    with pytest.raises(ValueError, match="-1h is an hour ago") as refusal:
        parse_instant(text, now=NOW)

    assert len(text) < 3 or text not in str(refusal.value)
