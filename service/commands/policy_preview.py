"""What a policy would do to the records that exist: counted over the whole ledger, and shown."""

import os
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Final

import click
import msgspec
from rich.table import Table

from service.config.settings import Settings
from service.core.durations import format_duration
from service.core.reapplying import Change, Effect, Left, reapply_policy
from service.core.retention import Policy
from service.ledger import reapplying
from service.ledger.database import Database
from service.ledger.reapplying import FIRST, Place, Seen
from service.runtime.terminal import cell, console, format_relative, format_time, plain


class Due(StrEnum):
    """When a changed record would be due."""

    AT_ONCE = "at_once"  # as soon as min_ttl allows
    HOUR = "within_an_hour"
    DAY = "within_a_day"
    LATER = "later"


class RulePair(msgspec.Struct, frozen=True, rename="camel"):
    """How many *records* get another rule, or the same one with another time."""

    old_rule: str
    new_rule: str
    records: int


class ChangeShown(msgspec.Struct, frozen=True, rename="camel"):
    """What becomes of one record; a due time is None for never."""

    account: str
    id: str
    effect: Effect
    old_rule: str
    new_rule: str
    old_due_at: datetime | None
    new_due_at: datetime | None


class Preview(msgspec.Struct, frozen=True, rename="camel"):
    """What a policy would do at the instant *at* to the records that a policy decided about, *examined* in all.

    *due* counts those that get another due time, *records* are the first to be due. *is_ttl_set* is false where
    MAYFLY_TTL is the default.
    """

    file: str
    ttl: str
    is_ttl_set: bool
    min_ttl: str
    at: datetime
    examined: int
    changed: int
    effects: dict[Effect, int]
    due: dict[Due, int]
    left: dict[Left, int]
    earliest: datetime | None
    rules: list[RulePair]
    records: list[ChangeShown]


# The due time of what is never due, to sort by.
_NEVER: Final = timedelta(days=10**6)
_MOVED: Final = (Effect.EARLIER, Effect.LATER, Effect.RELEASED)


class _Tally:
    """Counts what is seen, and remembers the *limit* changes that are due first: memory does not grow."""

    def __init__(self, policy: Policy, *, now: datetime, limit: int) -> None:
        self._policy = policy
        self._now = now
        self._limit = limit
        self._first: list[ChangeShown] = []
        self.examined = 0
        self.effects: Counter[Effect] = Counter()
        self.due: Counter[Due] = Counter()
        self.left: Counter[Left] = Counter()
        self.rules: Counter[tuple[str, str]] = Counter()
        self.earliest: datetime | None = None

    def add(self, seen: Seen) -> None:
        self.examined += 1
        found = reapply_policy(self._policy, seen.existing, now=self._now)
        if isinstance(found, Left):
            self.left[found] += 1
            return
        row, due_at = seen.row, found.retention.due_at
        self.effects[found.effect] += 1
        self.rules[row.rule, found.retention.rule] += 1
        if due_at is not None and found.effect in _MOVED:
            self.due[self._bucket(row.account, due_at)] += 1
            self.earliest = min(due_at, self.earliest or due_at)
        self._remember(_show(seen, found))

    def first(self) -> list[ChangeShown]:
        """Return the changes that are due first."""
        self._first.sort(key=self._place)
        del self._first[self._limit :]
        return self._first

    def _remember(self, change: ChangeShown) -> None:
        self._first.append(change)
        if len(self._first) > 2 * self._limit + 1000:
            self.first()

    def _place(self, change: ChangeShown) -> timedelta:
        is_due = change.new_due_at is not None and change.effect is not Effect.HELD
        return change.new_due_at - self._now if is_due and change.new_due_at else _NEVER

    def _bucket(self, account: str, due_at: datetime) -> Due:
        wait = due_at - self._now
        if wait <= self._policy.bounds_of(account).min_ttl:
            return Due.AT_ONCE
        return next((due for due, most in _BUCKETS if wait <= most), Due.LATER)


_BUCKETS: Final = ((Due.HOUR, timedelta(hours=1)), (Due.DAY, timedelta(days=1)))


def _show(seen: Seen, found: Change) -> ChangeShown:
    row, after = seen.row, found.retention
    return ChangeShown(row.account, row.id, found.effect, row.rule, after.rule, row.due_at, after.due_at)


async def read_all(database: Database, policy: Policy, *, until: datetime) -> AsyncIterator[list[Seen]]:
    """Yield batches of the records received before *until* that a policy decided about.

    Raises: LedgerUnavailableError.
    """
    place: Place | None = FIRST
    while place is not None:
        read = partial(reapplying.read_batch, rules=policy.rules, place=place, until=until)
        batch = await database.read(read)
        yield list(batch.seen)
        place = batch.next_place


async def make_preview(database: Database, settings: Settings, *, now: datetime, limit: int) -> Preview:
    """Read all records and return what the policy of *settings* would do now, with up to *limit* of them."""
    tally = _Tally(settings.policy, now=now, limit=limit)
    async for batch in read_all(database, settings.policy, until=now):
        for seen in batch:
            tally.add(seen)
    return Preview(
        file=str(settings.config_path),
        ttl=_format_ttl(settings.ttl),
        is_ttl_set=bool(os.environ.get("MAYFLY_TTL", "").strip()),
        min_ttl=_format_ttl(settings.min_ttl),
        at=now,
        examined=tally.examined,
        changed=tally.effects.total(),
        effects={effect: tally.effects[effect] for effect in Effect},
        due={due: tally.due[due] for due in Due},
        left={left: tally.left[left] for left in Left},
        earliest=tally.earliest,
        rules=[RulePair(*names, number) for names, number in tally.rules.most_common()],
        records=tally.first(),
    )


def _format_ttl(ttl: timedelta | None) -> str:
    return "forever" if ttl is None else format_duration(int(ttl.total_seconds()))


_EFFECTS: Final = {
    Effect.EARLIER: "are deleted earlier",
    Effect.LATER: "are kept longer",
    Effect.FOREVER: "are kept forever",
    Effect.RELEASED: "were kept forever and are deleted",
    Effect.HELD: "are held",
    Effect.SAME_TIME: "get another rule and keep their due time",
}
_DUES: Final = {
    Due.AT_ONCE: "as soon as the minimum ttl allows",
    Due.HOUR: "within an hour",
    Due.DAY: "within a day",
    Due.LATER: "later",
}
_LEFT: Final = {
    Left.OPERATOR: "an operator released, retried or reopened them",
    Left.UNKNOWN: "they would be deleted earlier, but a rule may protect them whose facts the API has not shown yet",
    Left.MOVED: "they would be deleted earlier, but a second webhook or a hold has moved their due time",
}


def print_preview(shown: Preview) -> None:
    """Print *shown* for people."""
    source = "" if shown.is_ttl_set else " (it is not set here: this is the default)"
    click.echo(f"{plain(shown.file)}, MAYFLY_TTL={shown.ttl}{source}, MAYFLY_MIN_TTL={shown.min_ttl}")
    click.echo(f"Of {_count(shown.examined)} that the policy decided, {shown.changed} would change.")
    _print_counts("", _EFFECTS, shown.effects)
    _print_counts("\nThey are due:", _DUES, shown.due)
    if shown.earliest is not None:
        when = f"{format_relative(shown.at, shown.earliest)}, at {format_time(shown.earliest)}"
        click.echo(f"The earliest deletion that follows is {when}.")
    _print_counts("\nOthers stay as they are:", _LEFT, shown.left)
    if shown.changed:
        _print_rules(shown)
        _print_records(shown)


def _count(number: int) -> str:
    return "1 record" if number == 1 else f"{number} records"


def _print_counts(title: str, words: dict[Effect, str] | dict[Due, str] | dict[Left, str], counts: object) -> None:
    numbers = counts if isinstance(counts, dict) else {}
    lines = [f"{numbers[key]:>8}  {text}" for key, text in words.items() if numbers.get(key)]
    if lines:
        click.echo("\n".join([title, *lines] if title else lines))


def _print_rules(shown: Preview) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("old rule", "new rule"):
        table.add_column(heading, overflow="fold")
    table.add_column("records", justify="right")
    for pair in shown.rules:
        table.add_row(cell(pair.old_rule), cell(pair.new_rule), str(pair.records))
    click.echo()
    console().print(table)


def _print_records(shown: Preview) -> None:
    if not shown.records:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("id", overflow="fold")
    for heading in ("what", "due until now", "due then", "new rule"):
        table.add_column(heading)
    for one in shown.records:
        times = (format_time(one.old_due_at) or "never", format_time(one.new_due_at) or "never")
        table.add_row(cell(one.id), one.effect.replace("_", " "), *times, cell(one.new_rule))
    click.echo()
    console().print(table)
    if (more := shown.changed - len(shown.records)) > 0:
        click.echo(f"and {more} more; --limit shows more of them")
