"""Retry-After is read in each of its forms; anything else counts as absent."""

from datetime import UTC, datetime, timedelta

import pytest

from service.core.retry_after import parse_retry_after

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("2", 2),
        (" 120 ", 120),
        ("1.5", 1),
        ("315360000", 315360000),
        ("Mon, 23 Nov 2026 12:00:30 GMT", 30),
        ("Mon, 23 Nov 2026 11:00:00 GMT", -3600),
        ("Mon, 23 Nov 2026 12:00:30 -0000", 30),
        ("Monday, 23-Nov-26 12:00:30 GMT", 30),
        ("Mon, 23 Nov 2026 13:00:30 +0100", 30),
    ],
)
def test_seconds_and_dates_in_retry_after_are_read(text, seconds):
    assert parse_retry_after(text, now=NOW) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-5", "+5", "soon", "Wed", "1e3", "٢", "²", "0x10", "9" * 10, "9" * 5000, "nan", "inf", "1_0"),
        *("Mon, 99 Nov 2026 12:00:30 GMT", "Mon, 23 Nov 99999 12:00:30 GMT", "2026-11-23T12:00:30Z", "\0", "None"),
        *(f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT", f"1 Jan 2026 {'9' * 20}:00:00", f"1 Jan 2026 0:0 +{'9' * 40}"),
        *("Mon, 23 Nov 2026 12:00:30 +9999", "Sat, 01 Jan 0001 00:00:00 +2359", "Fri, 31 Dec 9999 23:59:59 -2359"),
    ],
)
def test_any_other_retry_after_is_none(text):
    found = parse_retry_after(text, now=NOW)

    assert found is None or abs(found) > timedelta(days=300)
