"""Replays: what one does to a delivery, depending on what has become of it."""

from collections.abc import Collection
from datetime import datetime
from enum import StrEnum

from service.core.errors import ExplainedError
from service.core.forwarding import DeliveryState


class Replay(StrEnum):
    """What a replay does to a delivery."""

    REPLAYED = "replayed"  # it had ended, and begins anew
    ADVANCED = "advanced"  # it waited for its next attempt, which is due now
    ALREADY = "already"  # it was due
    ATTEMPTED = "attempted"  # an attempt is made now; nothing is changed
    NO_TARGET = "no_target"  # its target is not configured; nothing is changed


class NotReplayedError(ExplainedError):
    """A delivery that stays as it is; the text says why."""


def judge_replay(
    state: DeliveryState,
    wake_at: datetime | None,
    leased_until: datetime | None,
    *,
    is_configured: bool,
    now: datetime,
) -> Replay:
    """Decide what a replay at *now* does to a delivery; *is_configured*: its target is in the configuration."""
    if not is_configured:
        return Replay.NO_TARGET
    if leased_until is not None and leased_until > now:
        return Replay.ATTEMPTED
    if state is not DeliveryState.WAITING:
        return Replay.REPLAYED
    return Replay.ALREADY if wake_at is not None and wake_at <= now else Replay.ADVANCED


def require_target(target: str | None, configured: Collection[str]) -> None:
    """Return if *target* is None or *configured*.

    Raises: NotReplayedError.
    """
    if target is not None and target not in configured:
        raise NotReplayedError(
            f"target {target} is not in MAYFLY_CONFIG, so nothing was replayed: add its [[forward]] again first"
        )


def require_replayed(result: Replay, target: str) -> None:
    """Return if the delivery to *target* is sent again after *result*.

    Raises: NotReplayedError.
    """
    if result is Replay.NO_TARGET:
        require_target(target, ())
    if result is Replay.ATTEMPTED:
        raise NotReplayedError("an attempt at this delivery is being made now: nothing was changed, see how it ends")
