"""The checks at the end of the demo: compare Mayfly's records with the calls that the simulator received."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from service.core.lifecycle import State
from service.demo.app import Received
from service.demo.picture import Line
from service.simulator import Generation, Operation, Simulator


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise, and the violations of it that were found."""

    promise: str
    violations: list[str]


def inspect(
    simulator: Simulator,
    lines: list[Line],
    forged: Generation,
    forged_status: int,
    forged_requests: Sequence[Received] = (),
) -> list[Finding]:
    """Check every promise of the demo; *lines* are the final state."""
    deleted = [line for line in lines if line.scene.ends is State.DELETED]
    spared = [line for line in lines if line.scene.ends is not State.DELETED]
    refused = sum(line.scene.refusals for line in deleted)
    return [
        Finding("Every record ended as it should.", [p for line in lines for p in _check_ending(line)]),
        Finding(
            f"{len(deleted)} generations are deleted, none before its due time and none before its copy.",
            [p for line in deleted for p in _check_order(simulator, line)],
        ),
        Finding(
            "Each record has every field that the API showed.",
            [p for line in deleted for p in _check_copy(line)],
        ),
        Finding(
            f"The app has the webhooks of all {len(lines)} generations, each with both signatures.",
            [p for line in lines for p in _check_app(line)],
        ),
        Finding(
            f"The app refused {refused} of them at first: its DELETE came only after the app had taken it.",
            [p for line in deleted for p in _check_app_first(simulator, line)],
        ),
        Finding(
            f"{len(spared)} generations were to be kept: they exist, and no DELETE was sent.",
            [p for line in spared for p in _check_spared(simulator, line.generation, line.scene.title)],
        ),
        Finding(
            "The forged webhook was refused, and no call followed.",
            [f"it was answered {forged_status}"] * (forged_status != 401)
            + ["the app got it"] * bool(forged_requests)
            + _check_untouched(simulator, forged, "the forged one"),
        ),
    ]


def _check_ending(line: Line) -> list[str]:
    state = line.record.state if line.record else None
    outcome = line.record.outcome if line.record else None
    if (state, outcome) == (line.scene.ends, line.scene.outcome):
        return []
    return [f"{line.scene.title}: {state or 'no record'} {outcome or ''}"]


def _check_order(simulator: Simulator, line: Line) -> list[str]:
    """Check that the first DELETE came after the due time, and the deletion after the copy."""
    record, gone_at = line.record, simulator.deleted.get(line.generation.id)
    if record is None or record.due_at is None or record.copied_at is None or gone_at is None:
        return [f"{line.scene.title}: not copied, or not deleted"]
    calls = _calls(simulator, line.generation, Operation.DELETE)
    problems = []
    if min([*calls, gone_at]) < record.due_at:
        problems.append(f"{line.scene.title}: a DELETE came before the due time")
    if gone_at < record.copied_at:
        problems.append(f"{line.scene.title}: it was deleted before it was copied")
    return problems


def _check_copy(line: Line) -> list[str]:
    kept = msgspec.json.decode(msgspec.json.encode(line.record)) if line.record else {}
    shown = line.generation.body()
    return [
        f"{line.scene.title}: {name} is missing or different"
        for name, value in shown.items()
        if value is not None and kept.get(name) != value
    ]


def _check_app(line: Line) -> list[str]:
    """Check that the app refused as often as it should, then took the webhook once, as one delivery."""
    wanted = [False] * line.scene.refusals + [True]
    problems = []
    if [one.is_taken for one in line.requests] != wanted:
        answers = ", ".join(str(one.status) for one in line.requests) or "nothing"
        problems.append(f"{line.scene.title}: the app answered {answers}")
    if not all(one.is_genuine for one in line.requests):
        problems.append(f"{line.scene.title}: the app got a wrong signature")
    if len({one.delivery for one in line.requests}) > 1:
        problems.append(f"{line.scene.title}: Mayfly-Delivery changed between two attempts")
    return problems


def _check_app_first(simulator: Simulator, line: Line) -> list[str]:
    """Check that the first DELETE came after the app had taken the webhook."""
    taken = [one.at for one in line.requests if one.is_taken]
    calls = _calls(simulator, line.generation, Operation.DELETE)
    is_right = not calls or (taken and min(calls) >= min(taken))
    return [] if is_right else [f"{line.scene.title}: a DELETE came before the app had taken its webhook"]


def _check_spared(simulator: Simulator, generation: Generation, title: str) -> list[str]:
    if generation.id in simulator.generations and not _calls(simulator, generation, Operation.DELETE):
        return []
    return [f"{title}: a DELETE was sent, or it is gone"]


def _check_untouched(simulator: Simulator, generation: Generation, title: str) -> list[str]:
    if any(call.generation_id == generation.id for call in simulator.calls):
        return [f"{title}: it was called"]
    return _check_spared(simulator, generation, title)


def _calls(simulator: Simulator, generation: Generation, operation: Operation) -> list[datetime]:
    return [c.at for c in simulator.calls if c.generation_id == generation.id and c.operation is operation]
