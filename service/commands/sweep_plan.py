"""The plan of a sweep: a file with a line of JSON for each generation, which a person edits before it is applied.

A line that is deleted leaves its generation alone. ``"hold": "reason"`` in a line holds it.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from service.core.adopting import Scope
from service.core.errors import ExplainedError
from service.core.generation import MAX_ID_LENGTH

NEW: Final = "new"
_SHOWN: Final = 10


class PlanError(ExplainedError):
    """A plan that cannot be used; each of *problems* names its line. Nothing was written."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class PlanLine(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One generation, as it was when the plan was made. Only *id*, *account* and *hold* count when it is applied.

    *due_at* and *rule* are those of an adoption at that time; *state* is that of its record, or NEW.
    """

    id: Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH)]
    account: str
    created_at: str | None = None
    status: str | None = None
    model: str | None = None
    project_id: str | None = None
    output_file_name: str | None = None
    state: str | None = None
    due_at: datetime | None = None
    rule: str | None = None
    # Not an empty text: who protects a generation shall say why, and a half-done edit shall not delete it.
    hold: Annotated[str, Meta(min_length=1, max_length=500)] | None = None

    @property
    def is_new(self) -> bool:
        """Whether there was no record of it."""
        return self.state in (None, NEW)


@dataclass(slots=True)
class Plan:
    """The ids of one account in a plan, and the reasons of those that are held instead of scheduled."""

    ids: set[str] = field(default_factory=set)
    holds: dict[str, str] = field(default_factory=dict)

    def scope(self, account: str, public_url: str | None) -> Scope:
        """Return the scope of exactly these."""
        return Scope(account, public_url, "all", only=self.ids)


def write_plan(path: Path, lines: Iterable[PlanLine]) -> None:
    """Write a plan to a new file that only its owner may read: it has names of projects and files.

    Raises: FileExistsError for a file that is there, which may be a plan that somebody has edited; OSError.
    """
    text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)


def read_plan(path: Path, accounts: Sequence[str]) -> dict[str, Plan]:
    """Return the plan of each account; *accounts* are those that may be in it.

    Raises: PlanError with the line of each problem; OSError.
    """
    plans: dict[str, Plan] = {}
    problems: list[str] = []
    places: dict[tuple[str, str], int] = {}
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=PlanLine)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            problems.append(f"line {number} cannot be read: {error}")
            continue
        first = places.setdefault((line.account, line.id), number)
        if line.account not in accounts:
            problems.append(f"line {number} is about another account than {' and '.join(accounts)}")
        elif first != number:
            problems.append(f"line {number} has the same id as line {first}")
        else:
            _add_line(plans.setdefault(line.account, Plan()), line)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise PlanError([*(f"{path}: {one}" for one in problems[:_SHOWN]), *more])
    return plans


def _add_line(plan: Plan, line: PlanLine) -> None:
    plan.ids.add(line.id)
    if line.hold is not None:
        plan.holds[line.id] = line.hold
