"""What blocks a deletion now, in plain words: holds, pauses, targets without the webhook, a missing worker."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final

import msgspec

from service.core.requiring import OpenDelivery


class Obstacle(msgspec.Struct, frozen=True):
    """What blocks a deletion now: a hold, a pause by its kind, the dry run, or a worker that is missing.

    Of the kind ``forward`` is a target, the *actor*, that has not taken the webhook; *until* is its next attempt.
    """

    kind: str
    since: datetime | None
    actor: str | None
    reason: str | None
    until: datetime | None


def obstacle_of(one: OpenDelivery) -> Obstacle:
    """Return a required delivery that has not succeeded as what blocks a deletion."""
    tried = {0: "not tried yet", 1: "1 attempt"}.get(one.attempts, f"{one.attempts} attempts")
    error = f", the last: {one.error}" if one.error else ""
    return Obstacle("forward", one.received_at, one.target, f"delivery {one.id}, {tried}{error}", one.next_at)


def format_instant(at: datetime) -> str:
    """Return an instant as explanations show it."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


_PAUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "operator": "deletions are paused since {since} by {actor}: {reason}. mayfly resume ends it.",
        "unauthorized": (
            "the API has refused the key since {since}. One record a minute tests it, and deletions go on once it "
            "works: check SYNC_API_KEY."
        ),
        "daily_limit": (
            "the limit of deletions per day is reached since {since}: {reason}. Deletions go on at {until}; "
            "mayfly resume or a higher MAYFLY_MAX_DELETES_PER_DAY ends it earlier."
        ),
        "wrong_organisation": (
            "the key knows no generation since {since}, as if it were another organisation's: check SYNC_API_KEY; "
            "mayfly resume ends it."
        ),
        "throttled": "the API answered 429, too many requests, and wants no calls until {until}.",
        "dry_run": "MAYFLY_DRY_RUN is set here.",
        "forward": (
            "it waits for target {actor}, which has not taken its webhook of {since} ({reason}); the next attempt is "
            "at {until}."
        ),
        "forward failed": (
            "target {actor} has not taken its webhook of {since} ({reason}). No attempt follows by itself, and the "
            "record fails once it is due: mayfly forwards replay with that id tries again."
        ),
        "hold": "{actor} holds it ({reason}); the next attempt leads to the state held.",
    }
)


def describe_obstacle(one: Obstacle, *, now: datetime) -> str:
    """Say what blocks the deletion, since when, and what ends it."""
    if one.kind == "no_worker":
        if one.since is None:
            return "Not deleted now: no worker has been seen; mayfly up or mayfly worker deletes."
        minutes = int((now - one.since) / timedelta(minutes=1))
        return f"Not deleted now: no worker has been seen for {minutes} min; check mayfly up or mayfly worker."
    named = {"actor": one.actor or "Mayfly", "reason": one.reason or "no reason given"}
    times = {
        "since": format_instant(one.since) if one.since else "a while",
        "until": format_instant(one.until) if one.until else "a resume",
    }
    kind = "forward failed" if one.kind == "forward" and one.until is None else one.kind
    text = _PAUSED.get(kind, "deletions are paused ({kind}) since {since}: {reason}.")
    return "Not deleted now: " + text.format(kind=one.kind, **named, **times)
