"""The verdict on a run: compares input and output, seen from outside only (I1 to I8; see judging_forwards, too)."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from service.simulator import Call, Operation, Simulator
from tests.faults.databases import Row, UnseenError
from tests.faults.judging_forwards import Deletion, Findings

FINAL = frozenset({"deleted", "failed", "held", "kept"})


@dataclass(frozen=True, slots=True)
class Sent:
    """One terminal webhook as it was sent: the status is None when the answer never came."""

    id: str
    status: int | None
    answered_at: datetime
    due_at: datetime | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether it was answered 2xx."""
        return self.status is not None and 200 <= self.status < 300


class WatchedCalls(list[Call]):
    """The simulator's log, which looks at the ledger while a DELETE stands at the API's door."""

    def __init__(self, copied_at: Callable[[str], datetime | None]) -> None:
        super().__init__()
        self._copied_at = copied_at
        self.without_copy: list[str] = []
        self.unseen: list[Call] = []  # the database did not answer at that moment: it is asked as soon as it does
        self.deletions: list[Deletion] = []

    def append(self, call: Call) -> None:
        """Log *call*."""
        super().append(call)
        if call.operation is not Operation.DELETE:
            return
        self._check_copy(call)

    async def keep_looking(self) -> None:
        """Ask, for ever, about what could not be seen: long before another attempt could make up for its copy."""
        while True:
            await asyncio.sleep(0.05)
            unseen, self.unseen = self.unseen, []
            for call in unseen:
                self._check_copy(call)

    def _check_copy(self, call: Call) -> None:
        try:
            copied_at = self._copied_at(call.generation_id)
        except UnseenError:
            self.unseen.append(call)
            return
        if copied_at is None:
            self.without_copy.append(call.generation_id)
        else:
            self.deletions.append(Deletion(call.generation_id, call.at.timestamp(), copied_at.timestamp()))


@dataclass(slots=True)
class Verdict:
    """What the judge found, one sentence each; nothing is good."""

    lost: list[str] = field(default_factory=list)  # I1, I4
    early: list[str] = field(default_factory=list)  # I3
    unrecorded: list[str] = field(default_factory=list)  # I2
    uninvited: list[str] = field(default_factory=list)  # I5
    leaked: list[str] = field(default_factory=list)  # I6
    unhealthy: list[str] = field(default_factory=list)  # I7
    untrue: list[str] = field(default_factory=list)  # I8
    forwards: Findings = field(default_factory=Findings)  # I9 to I12

    @property
    def all(self) -> list[str]:
        """Every breach."""
        records = [*self.lost, *self.early, *self.unrecorded, *self.uninvited, *self.untrue]
        return [*records, *self.leaked, *self.unhealthy, *self.forwards.all]


def judge(
    *,
    sent: Sequence[Sent],
    rows: Sequence[Row],
    simulator: Simulator,
    logs: Iterable[Path] = (),
    secrets: Sequence[str] = (),
    may_fail: frozenset[str] = frozenset(),
    unhealthy: Sequence[str] = (),
    forwards: Findings | None = None,
) -> Verdict:
    """Judge a run after it was drained; *may_fail* are the ids that may need an operator.

    *unhealthy* are the late and wrong answers about health that the health_monitor met, *forwards* what judge_forwards
    found.
    """
    verdict = Verdict(unhealthy=list(unhealthy), forwards=forwards or Findings())
    _judge_rows(verdict, sent, rows, simulator, may_fail)
    _judge_calls(verdict, sent, rows, simulator)
    for log in logs:
        text = log.read_text(errors="replace")
        verdict.leaked += [f"I6 {log.name} holds the secret that ends in {one[-6:]}" for one in secrets if one in text]
        if "token=" in text.replace("token=…", ""):
            verdict.leaked.append(f"I6 {log.name} holds a URL with its token")
    return verdict


def _judge_rows(
    verdict: Verdict, sent: Sequence[Sent], rows: Sequence[Row], simulator: Simulator, may_fail: frozenset[str]
) -> None:
    found: dict[str, int] = {}
    for row in rows:
        found[row.id] = found.get(row.id, 0) + 1
    for accepted in {one.id for one in sent if one.is_accepted}:
        if found.get(accepted, 0) != 1:
            verdict.lost.append(f"I1 {accepted} was answered 2xx and has {found.get(accepted, 0)} rows")
    for row in rows:
        if row.state not in FINAL:
            verdict.lost.append(f"I4 {row.id} is still {row.state} after {row.attempts} attempts: {row.last_error}")
        if row.state == "failed" and row.id not in may_fail:
            verdict.lost.append(f"I4 {row.id} was given up: {row.last_error}")
        if row.state == "deleted" and row.id in simulator.generations:
            verdict.untrue.append(f"I8 {row.id} is called deleted and still there ({row.outcome})")
        if row.outcome == "deleted" and not row.copy:
            verdict.unrecorded.append(f"I2 {row.id} was deleted and has no copy")


def _judge_calls(verdict: Verdict, sent: Sequence[Sent], rows: Sequence[Row], simulator: Simulator) -> None:
    by_id = {row.id: row for row in rows}
    told: dict[str, list[Sent]] = {}
    for one in sent:
        told.setdefault(one.id, []).append(one)
    known = {one.id for one in sent if one.status is None or one.is_accepted}
    known |= {row.id for row in rows if row.notification is None}  # adopted
    calls = simulator.calls
    if isinstance(calls, WatchedCalls):
        verdict.unrecorded += [f"I2 DELETE of {one} before its copy could be read" for one in calls.without_copy]
        verdict.unrecorded += [
            f"I2 DELETE of {one.generation_id}, and nobody could see whether its copy was kept" for one in calls.unseen
        ]
    for call in calls:
        if call.operation is Operation.COLLECTION_DELETE:
            verdict.uninvited.append(f"I5 DELETE of the collection: {call.raw_path}")
        if call.operation is not Operation.DELETE:
            continue
        row = by_id.get(call.generation_id)
        if row is None or call.generation_id not in known:
            verdict.uninvited.append(f"I5 DELETE of {call.generation_id}, which nobody announced")
            continue
        due_at = _promised(call, row, told.get(row.id, []))
        if due_at is None or call.at < due_at:
            verdict.early.append(f"I3 DELETE of {call.generation_id} at {call.at}, due {due_at}")


def _promised(call: Call, row: Row, told: Sequence[Sent]) -> datetime | None:
    """Return the due time that held when the DELETE came: a later announcement may have moved it since."""
    answers = [one.due_at for one in told if one.due_at and one.answered_at <= call.at]
    return max(answers, default=row.due_at)
