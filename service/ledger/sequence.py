"""Numbers that order rows by time and need no round trip to the database."""

import random
import time
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_MOST = 2**63 - 1
_RANDOM_BITS = 11  # microseconds since 1970 times 2048 fits 63 bits until the year 2112
_LEFT_OUT_BITS = 20  # a quarter of a millisecond, less than two processes need to take turns at writing
_last = 0


def number_at(at: datetime, shift: timedelta) -> int:
    """Return the least number that next_numbers() would return at the aware instant *at* shifted by *shift*."""
    return min(max(0, (at - _EPOCH + shift) // _MICROSECOND) << _RANDOM_BITS, _MOST)


def next_numbers(count: int) -> range:
    """Return *count* numbers greater than any this process returned before, near the time in microseconds times 2048.

    Two processes make the same one about once in 2048 simultaneous microseconds; the unique key then refuses the
    second, and whoever inserts tries again with a new one.
    """
    global _last  # noqa: PLW0603 - the one thing that must be remembered between calls
    noise = random.getrandbits(_RANDOM_BITS)
    first = max(_last + 1, (time.time_ns() // 1000 << _RANDOM_BITS) | noise)
    _last = first + count - 1
    return range(first, first + count)


def go_on_after(number: int) -> None:
    """Have next_numbers() return greater ones than *number* of another process, whose clock may be ahead.

    Some are left out: that process may have given those behind it to other rows.
    """
    global _last  # noqa: PLW0603 - as above
    _last = max(_last, number + random.getrandbits(_LEFT_OUT_BITS))
