"""A limit for log lines that anyone can cause: the first of a kind is written, the others are counted and summed up."""

import asyncio
from collections.abc import Callable
from typing import Final

WINDOW_SECONDS: Final = 60.0

# Writes the line: what the last one of the kind said, how many there were, and in how many seconds.
Write = Callable[[str, int, float], object]


class LogLimit:
    """At most one line in each window of time for each kind. Kinds are a closed set: none comes from outside."""

    def __init__(self, *, seconds: float = WINDOW_SECONDS) -> None:
        self._seconds = seconds
        self._open: dict[str, _Window] = {}

    def note(self, kind: str, reason: str, write: Write) -> None:
        """Write the first of *kind* at once, with a number of 1; the number of those that follow when the window ends.

        Call it within the running loop.
        """
        if (window := self._open.get(kind)) is not None:
            window.number, window.reason = window.number + 1, reason
            return
        self._open[kind] = _Window(write)
        self._schedule_end(kind)
        write(reason, 1, 0)

    def close(self) -> None:
        """Write the numbers that are not written yet."""
        for kind, window in self._open.items():
            window.cancel()
            self._write_number(kind)
        self._open.clear()

    def _schedule_end(self, kind: str) -> None:
        loop = asyncio.get_running_loop()
        self._open[kind].cancel = loop.call_later(self._seconds, self._end_window, kind).cancel

    def _end_window(self, kind: str) -> None:
        if self._write_number(kind):
            self._schedule_end(kind)
        else:
            del self._open[kind]

    def _write_number(self, kind: str) -> bool:
        """Write how many there were since the last line; False if there were none."""
        window = self._open[kind]
        number, window.number = window.number, 0
        if number:
            window.write(window.reason, number, self._seconds)
        return bool(number)


class _Window:
    def __init__(self, write: Write) -> None:
        self.write = write
        self.number, self.reason = 0, ""
        self.cancel: Callable[[], object] = lambda: None
