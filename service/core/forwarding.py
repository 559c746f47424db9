"""Forwarding: which targets a webhook is for, when a delivery is tried again, and what an answer means for it.

Schedule and headers are those of Standard Webhooks 1.0.0, whose retries span three days.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final, Literal

import msgspec

from service.core.generation import Generation
from service.core.matchers import Facts, Texts
from service.core.overrides import InvalidOverrideError, read_overrides
from service.core.secret import Secret

# The waits before the second, third, … attempt: 72 hours in all, and up to 86 with jitter.
WAITS: Final = (
    timedelta(seconds=5),
    timedelta(minutes=1),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=5),
    timedelta(hours=10),
    timedelta(hours=14),
    timedelta(hours=20),
    timedelta(hours=20),
)
MAX_ATTEMPTS: Final = len(WAITS) + 1
# A delivery that waits at a closed circuit ends after this, counted from its receipt or its last replay.
GIVE_UP_AFTER: Final = sum(WAITS, timedelta(hours=4))
# A wait may be longer by up to this share of it, so that what failed together does not come back together.
_JITTER: Final = 0.2
_MIN_RETRY_AFTER: Final = timedelta(seconds=1)
_MAX_RETRY_AFTER: Final = timedelta(hours=24)
_GONE: Final = 410


class DeliveryState(StrEnum):
    """Where a delivery is in its life."""

    WAITING = "waiting"  # for its next attempt, or one is being made
    DELIVERED = "delivered"  # its target answered 2xx
    FAILED = "failed"  # no attempt is left, or the target does not want it; a replay begins again


@dataclass(frozen=True, slots=True)
class Target:
    """A ``[[forward]]``: an app that receives webhooks. Its *url* may have a secret in it.

    *texts* must all match: the status, the account, and labels. *timeout* bounds one attempt as a whole; *concurrency*
    is how many attempts a worker makes at once. With *secrets* each attempt is signed with each of them as well. If it
    *is_required*, a generation is not deleted before this target has answered 2xx.
    """

    id: str
    url: Secret
    texts: tuple[Texts, ...] = ()
    timeout: timedelta = timedelta(seconds=15)
    concurrency: int = 8
    secrets: tuple[Secret, ...] = ()
    is_required: bool = False

    def wants(self, facts: Facts) -> bool:
        """Whether it gets the webhook that *facts* are about."""
        return not self.find_mismatches(facts)

    def find_mismatches(self, facts: Facts) -> tuple[Texts, ...]:
        """Return which of its *texts* do not match *facts*; none if it gets the webhook."""
        return tuple(matcher for matcher in self.texts if not matcher.matches(facts))


def choose_targets(targets: Sequence[Target], account: str, generation: Generation) -> tuple[Target, ...]:
    """Return those of *targets* that get the webhook of *generation*, which may be a batch or not have ended."""
    if not targets:
        return ()
    # Reading labels takes long, and the retention reads them as well: here only for a target that asks for them.
    is_asked = any(matcher.name.startswith("label.") for target in targets for matcher in target.texts)
    facts = facts_for_targets(account, generation) if is_asked else Facts(account=account, status=generation.status)
    return tuple(target for target in targets if target.wants(facts))


def facts_for_targets(account: str, generation: Generation) -> Facts:
    """Return what a target can ask about the webhook of *generation*."""
    return Facts(account=account, status=generation.status, labels=_labels_of(generation.webhook_url))


def _labels_of(webhook_url: str | None) -> dict[str, str]:
    if not webhook_url:
        return {}
    try:
        return read_overrides(webhook_url).labels
    except InvalidOverrideError:  # the record is held because of it, and says so
        return {}


class Reply(msgspec.Struct, frozen=True, gc=False):
    """What one attempt led to: the *status* of the answer, or None and an *error* without one.

    *answer* is how the body begins, *retry_after* what the target asks for.
    """

    status: int | None
    answer: str = ""
    error: str | None = None
    retry_after: timedelta | None = None

    @property
    def is_success(self) -> bool:
        """Whether the target has taken it. A redirect is none: it is not followed."""
        return self.status is not None and 200 <= self.status < 300


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What follows: the *state*, after which *wait* the next attempt begins, and *error*, why it was not taken."""

    state: DeliveryState
    wait: timedelta | None = None
    error: str | None = None

    @property
    def label(self) -> Literal["delivered", "deferred", "failed"]:
        """The outcome as metrics name it."""
        match self.state:
            case DeliveryState.DELIVERED:
                return "delivered"
            case DeliveryState.WAITING:
                return "deferred"
            case _:
                return "failed"


def judge_reply(reply: Reply, *, attempts: int, jitter: float) -> Outcome:
    """Decide what follows *reply*, that of attempt number *attempts* from 1; *jitter* is from 0 to 1."""
    if reply.is_success:
        return Outcome(DeliveryState.DELIVERED)
    error = describe_reply(reply)
    if reply.status == _GONE:
        return Outcome(DeliveryState.FAILED, None, f"{error}: it does not want this webhook")
    if attempts >= MAX_ATTEMPTS:
        return Outcome(DeliveryState.FAILED, None, f"no 2xx in {attempts} attempts; the last: {error}")
    return Outcome(DeliveryState.WAITING, wait_after(attempts, reply.retry_after, jitter=jitter), error)


def wait_after(attempts: int, retry_after: timedelta | None, *, jitter: float) -> timedelta:
    """Return the wait after attempt number *attempts*: as scheduled, or longer if the target asks for that."""
    scheduled = WAITS[min(attempts, len(WAITS)) - 1] * (1 + _JITTER * jitter)
    if retry_after is None:
        return scheduled
    return max(scheduled, min(max(retry_after, _MIN_RETRY_AFTER), _MAX_RETRY_AFTER))


def describe_reply(reply: Reply) -> str:
    """Say in a few words why *reply* is no success; without the answer's text, which may have anything in it."""
    if reply.status is None:
        return reply.error or "no answer"
    if 300 <= reply.status < 400:
        return f"answered {reply.status}, a redirect, which is not followed"
    return f"answered {reply.status}"
