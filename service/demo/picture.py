"""The table of the demo, and the text of its lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from service.core.attempts import Outcome
from service.core.lifecycle import State
from service.demo.app import Received
from service.demo.scenes import Scene
from service.ledger.views import Record
from service.runtime.terminal import STATE_STYLES
from service.simulator import Generation
from service.simulator.generation import UNFINISHED


@dataclass(frozen=True, slots=True)
class Line:
    """One generation at one moment; *record* is None before its webhook, which the app got by *requests*."""

    scene: Scene
    generation: Generation
    record: Record | None
    requests: Sequence[Received] = ()

    @property
    def at_sync(self) -> str:
        """Its status at the API, or ``gone``."""
        return "gone" if self.generation.deleted_at else self.generation.status

    @property
    def at_app(self) -> str:
        """A tick if the app has its webhook, else what it answered last; empty before."""
        if not self.requests:
            return ""
        return "✓" if self.requests[-1].is_taken else str(self.requests[-1].status)

    @property
    def progress(self) -> tuple[object, ...]:
        """What a new line is printed for when it changes."""
        has_refused = any(not one.is_taken for one in self.requests)
        app = self.at_app if has_refused else ""
        record = () if self.record is None else (self.record.state, self.record.attempts, self.record.waits_for)
        return (self.at_sync, app, *record)


def table_of(lines: list[Line], now: datetime, title: str) -> Table:
    """Draw all *lines*."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0, expand=True)
    columns = (("generation", 24), ("at sync.so", 10), ("app", 3), ("record", 9), ("tries", 5), ("copied", 6))
    for heading, width in columns:
        is_tick = heading in ("app", "copied")
        table.add_column(heading, width=width, no_wrap=True, justify="center" if is_tick else "left")
    table.add_column("what happens", no_wrap=True, overflow="ellipsis", ratio=1)
    for line in lines:
        record = line.record
        state = "" if record is None else f"[{STATE_STYLES[record.state]}]{record.state}[/]"
        tries = str(record.attempts) if record and record.attempts else ""
        copied = "✓" if record and record.copied_at else ""
        what = escape(what_happens(line, now))
        table.add_row(escape(line.scene.title), line.at_sync, line.at_app, state, tries, copied, what)
    return table


def what_happens(line: Line, now: datetime) -> str:
    """Describe in a few words what the generation waits for, or how it ended."""
    if line.record is not None:
        return _describe_record(line.record, now)
    return "is being made" if line.generation.status in UNFINISHED else "its webhook is on its way"


def _describe_record(record: Record, now: datetime) -> str:
    match record.state:
        case State.SCHEDULED:
            return _describe_scheduled(record, now)
        case State.DELETED if record.deleted_at and record.due_at:
            late = (record.deleted_at - record.due_at).total_seconds()
            gone = "found gone " if record.outcome == Outcome.ALREADY_GONE else ""
            return f"{gone}{late:.1f} s after its due time"
        case State.HELD if record.hold:
            return f"on hold until an operator releases it: {record.hold.reason}"
        case State.KEPT:
            return f"kept forever ({record.retention.rule})"
        case State.FAILED:
            return f"given up: {record.last_error}"
        case _:
            return "is being copied and deleted"


def _describe_scheduled(record: Record, now: datetime) -> str:
    if record.waits_for is not None:
        return "due, and waits until its app has the webhook"
    wait = max(((record.next_attempt_at or now) - now).total_seconds(), 0)
    why = (record.last_error or "").removeprefix("the API answered ")
    return f"again in {wait:.1f} s: {why}" if why else f"due in {wait:.1f} s"
