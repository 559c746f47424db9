"""Holds: which of two is the longer one, and when they end."""

from datetime import UTC, datetime, timedelta

import pytest

from service.core.holding import Hold, longer_hold, parse_until

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SOON, LATER = Hold("ann", None, NOW + timedelta(days=1)), Hold("bob", "b", NOW + timedelta(days=2))
ENDLESS = Hold("carl", "c", None)


@pytest.mark.parametrize(
    ("first", "second", "longer"),
    [
        (SOON, LATER, LATER),
        (LATER, SOON, LATER),
        (SOON, ENDLESS, ENDLESS),
        (ENDLESS, LATER, ENDLESS),
        (ENDLESS, Hold("dora", None, None), ENDLESS),
        (None, SOON, SOON),
        (SOON, None, SOON),
        (None, None, None),
    ],
)
def test_of_two_holds_the_longer_one_counts_and_the_first_of_equals(first, second, longer):
    assert longer_hold(first, second) == longer


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("30d", NOW + timedelta(days=30)),
        ("90s", NOW + timedelta(seconds=90)),
        ("2026-12-31", datetime(2027, 1, 1, tzinfo=UTC)),
        ("2026-12-31T10:00:00+02:00", datetime(2026, 12, 31, 8, tzinfo=UTC)),
        (" 2026-12-31T10:00:00Z ", datetime(2026, 12, 31, 10, tzinfo=UTC)),
    ],
)
def test_the_end_of_a_hold_is_a_date_an_instant_or_a_duration(text, until):
    assert parse_until(text, now=NOW) == until


@pytest.mark.parametrize("text", ["", "30", "tomorrow", "2026-12-31T10:00:00", "forever", "9999-99-99", "999999999w"])
def test_an_end_that_cannot_be_read_says_what_is_accepted(text):
    with pytest.raises(ValueError, match="2026-12-31, an instant with its offset, or a number with a unit"):
        parse_until(text, now=NOW)


@pytest.mark.parametrize("text", ["0s", "2026-02-28", "2026-03-01T12:00:00Z"])
def test_an_end_that_is_past_is_refused(text):
    with pytest.raises(ValueError, match="a time in the future"):
        parse_until(text, now=NOW)
