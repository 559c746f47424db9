"""Which generations of a list are adopted, though no webhook told of them, and when they are due. Pure decisions."""

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec

from service.core.durations import parse_instant
from service.core.generation import RUNNING, Generation
from service.core.key import DEFAULT_ACCOUNT
from service.core.overrides import WEBHOOK_PATH
from service.core.retention import Policy, Retention, decide_retention
from service.core.rules import read_facts

Adopt = Literal["ours", "without-webhook", "all"]

# Who made a generation without our webhookUrl polls for it, and then downloads it.
POLLERS_TTL: Final = timedelta(minutes=15)
_PORTS: Final[Mapping[str, int]] = {"https": 443, "http": 80}
_AFTER_PATH: Final = re.compile("[?#]")


class Fit(StrEnum):
    """What becomes of one generation in a list."""

    FITS = "fits"  # it is adopted, unless there is a record of it
    RUNNING = "running"  # it has not ended
    UNKNOWN_STATUS = "unknown_status"  # a status that this release does not know: it may still be in use
    FOREIGN = "foreign"  # its webhookUrl is not the account's, and `adopt` does not ask for it
    RECENT = "recent"  # it is not old enough for what was asked for
    BATCH = "batch"  # it is no generation, but a batch
    NOT_ASKED_FOR = "not_asked_for"  # others are asked for, by their ids


@dataclass(frozen=True, slots=True)
class Scope:
    """What is adopted of *account*, whose webhooks come to its route under *public_url*.

    *adopt* is the account's setting. *created_before* leaves out what is younger, and what does not say when it was
    created; None is no limit. *only* leaves out all other ids.
    """

    account: str
    public_url: str | None
    adopt: Adopt
    created_before: datetime | None = None
    only: AbstractSet[str] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing can fit: without a public URL no webhookUrl is known to be ours."""
        return self.public_url is None and self.adopt == "ours"

    def find_fit(self, generation: Generation) -> Fit:
        """Decide about one generation of the account's list, whatever records there are."""
        if self.only is not None and generation.id not in self.only:
            return Fit.NOT_ASKED_FOR
        if generation.is_batch:
            return Fit.BATCH
        if not generation.is_terminal:
            return Fit.RUNNING if generation.status in RUNNING else Fit.UNKNOWN_STATUS
        if not self._is_wanted(generation.webhook_url):
            return Fit.FOREIGN
        if self.created_before is not None and not _is_before(generation.created_at, self.created_before):
            return Fit.RECENT
        return Fit.FITS

    def _is_wanted(self, webhook_url: str | None) -> bool:
        if self.adopt == "all" or (self.adopt == "without-webhook" and not webhook_url):
            return True
        return is_our_webhook(webhook_url, self.public_url, self.account)


def is_our_webhook(webhook_url: str | None, public_url: str | None, account: str) -> bool:
    """Whether *webhook_url* is the route of *account* under *public_url*.

    Scheme, host, port and path must be the same. A URL that different programs may read in different ways is not
    ours: what is not adopted stays.
    """
    theirs, base = _split(webhook_url), _split(public_url)
    if theirs is None or base is None or _origin(theirs) != _origin(base):
        return False
    path = base.path.rstrip("/") + WEBHOOK_PATH
    routes = [f"{path}/{account}", path] if account == DEFAULT_ACCOUNT else [f"{path}/{account}"]
    return theirs.path.removesuffix("/") in routes


def _split(url: str | None) -> SplitResult | None:
    """Split *url*; None if it is not one, has a login, or may be read in different ways."""
    head = _AFTER_PATH.split(url or "", maxsplit=1)[0]
    if not head.isprintable() or " " in head or "\\" in head:
        return None
    try:
        parts = urlsplit(head)
        has_port = parts.port != 0
    except ValueError:
        return None
    return parts if has_port and parts.hostname and parts.scheme in _PORTS and "@" not in parts.netloc else None


def _origin(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme]


def _is_before(created_at: str | None, instant: datetime) -> bool:
    at = read_created_at(created_at)
    return at is not None and at < instant


def read_created_at(created_at: str | None) -> datetime | None:
    """Return when a generation was created; None if it does not say so, or not with a time zone."""
    try:
        return parse_instant(created_at or "")
    except (ValueError, OverflowError):
        return None


def decide_adopted_retention(policy: Policy, scope: Scope, generation: Generation, *, now: datetime) -> Retention:
    """Decide how long an adopted generation is kept, from *now* on: by its override, the rules, else the policy's ttl.

    All facts are known. One that is not ours is kept for POLLERS_TTL at least.
    """
    retention = decide_retention(
        policy,
        read_facts(policy.rules, scope.account, generation, is_complete=True),
        webhook_url=generation.webhook_url,
        sent_at=now,
        now=now,
    )
    if is_our_webhook(generation.webhook_url, scope.public_url, scope.account):
        return retention
    earliest = now + POLLERS_TTL
    if retention.is_later_than(earliest) or retention.due_at is None:
        return retention
    return msgspec.structs.replace(retention, ttl=POLLERS_TTL, due_at=earliest)
