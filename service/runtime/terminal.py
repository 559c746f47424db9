"""Output on a terminal: foreign text without control characters, times, the colour of each state, tables."""

import re
import sys
import unicodedata
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from service.core.lifecycle import State

# The colour of each state, the same in every table.
STATE_STYLES: Final = {
    State.SCHEDULED: "yellow",
    State.DELETING: "cyan",
    State.DELETED: "green",
    State.FAILED: "bold red",
    State.HELD: "magenta",
    State.KEPT: "blue",
}
# Control characters, invisible ones (which change the direction of text), lone surrogates, line ends.
_ESCAPED: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS: Final = "\u200c\u200d"  # harmless, and parts of words and emoji
_ENDS_LINE: Final = "\n"


def plain(text: str) -> str:
    r"""Return *text* on one line, with each character that could control a terminal as ``\x1b`` or ``\u202e``.

    Every text from outside (file names, models, errors, reasons, actors) is printed through this or through cell().
    """
    if text.isprintable():
        return text
    return "".join(_escape(one) if _is_control(one) else one for one in text)


def cell(text: str) -> Text:
    """Return the foreign *text* for a cell of a table: escaped, and its brackets are no markup."""
    return Text(plain(text))


def plain_json(text: str) -> str:
    r"""Return the JSON *text* with control characters inside its strings as ``\u202e``; its value is the same."""
    return "".join(_escape_json(one) if one != _ENDS_LINE and _is_control(one) else one for one in text)


def _is_control(one: str) -> bool:
    return unicodedata.category(one) in _ESCAPED and one not in _JOINERS


def _escape(one: str) -> str:
    return one.encode("unicode_escape").decode()


def _escape_json(one: str) -> str:
    units = one.encode("utf-16-be", "surrogatepass").hex()
    return re.sub("....", r"\\u\g<0>", units)


class _SafeConsole(Console):
    """A console on which no text controls the terminal, also where a caller forgot plain(); styles are rich's."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render *renderable* with the control characters of its texts escaped."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                lines = segment.text.split(_ENDS_LINE)
                yield Segment(_ENDS_LINE.join(plain(line) for line in lines), segment.style)


def console() -> Console:
    """Return the console for tables: as wide as the terminal, and 200 columns without one."""
    return _SafeConsole(highlight=False) if sys.stdout.isatty() else _SafeConsole(highlight=False, width=200)


def format_relative(now: datetime, at: datetime) -> str:
    """Format *at* relative to *now*: ``in 3 h``, ``5 min ago``."""
    seconds = int(abs(at - now).total_seconds())
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            span = f"{seconds // size} {unit}"
            return f"in {span}" if at > now else f"{span} ago"
    return "now"


def format_time(at: datetime | None) -> str:
    """Format *at* for people, in UTC; an empty text for None."""
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"
