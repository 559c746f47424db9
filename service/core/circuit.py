"""A circuit breaker: what does not answer is left alone, and tried once in a while."""

from datetime import datetime, timedelta
from typing import Final

FAILURES: Final = 10
PROBE_EVERY: Final = timedelta(seconds=30)


class Circuit:
    """Opens after FAILURES failures in a row, and closes with the first success. It has no clock: *now* is passed in.

    While it is open, one attempt is allowed each PROBE_EVERY.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._opened_at: datetime | None = None  # None: it is closed
        self._probe_at: datetime | None = None

    @property
    def is_open(self) -> bool:
        """Whether nearly all attempts are refused."""
        return self._probe_at is not None

    def is_open_for(self, duration: timedelta, now: datetime) -> bool:
        """Whether it has been open for *duration*."""
        return self._opened_at is not None and now - self._opened_at >= duration

    def allows(self, now: datetime) -> bool:
        """Whether an attempt may begin."""
        # Further away than that, it was set before the clock was put back.
        return self._probe_at is None or not now < self._probe_at <= now + PROBE_EVERY

    def begin(self, now: datetime) -> bool:
        """Return whether an attempt may begin, and count it: the next one while it is open comes later."""
        if not self.allows(now):
            return False
        if self._probe_at is not None:
            self._probe_at = now + PROBE_EVERY
        return True

    def cancel(self, now: datetime) -> None:
        """Take back a begin() that led to no attempt: another one may begin at once."""
        if self._probe_at is not None:
            self._probe_at = now

    def note_success(self) -> bool:
        """Close it, and return whether it was open."""
        was_open, self._failures, self._opened_at, self._probe_at = self.is_open, 0, None, None
        return was_open

    def note_failure(self, now: datetime) -> bool:
        """Count a failure, and return whether it opened now."""
        self._failures += 1
        if self.is_open or self._failures < FAILURES:
            return False
        self._opened_at, self._probe_at = now, now + PROBE_EVERY
        return True
