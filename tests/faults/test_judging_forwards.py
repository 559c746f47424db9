"""The verdict on what was forwarded, on runs made up by hand: a good one, and one for each breach."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from tests.faults.databases import DeliveryRow
from tests.faults.judging_forwards import Deletion, Findings, Inbox, Told, judge_forwards
from tests.support.app import App, Received
from tests.support.forwards import FORWARD_SECRET, forwarded_headers
from tests.support.webhooks import Webhook, webhook

# A run lasts from second 0 to 100 here.
_SENT = {status: webhook(id="g-1", status=status) for status in ("PROCESSING", "COMPLETED")}
_AGAIN = webhook(_SENT["COMPLETED"].body + b" ")


def told(sent: Webhook, at: float, *, status: str = "COMPLETED", is_accepted: bool = True) -> Told:
    """Return *sent* as it was told at second *at*, and answered half a second later."""
    return Told("g-1", status, sent.body, sent.headers["Sync-Signature"], at, at + 0.5, is_accepted=is_accepted)


def got(sent: Webhook, delivery: str, at: float, *, attempt: int = 1, begun: int | None = 200) -> Received:
    """Return the request of an attempt to forward *sent*, answered at second *at*."""
    headers = forwarded_headers(sent, delivery=delivery, attempt=attempt)
    return Received(at, "POST", "/crm", tuple(headers.items()), sent.body, begun=begun, begun_at=at)


def row(sent: Webhook, delivery: str, *, state: str = "delivered") -> DeliveryRow:
    """Return the delivery of *sent*."""
    return DeliveryRow(delivery, "crm", "g-1", state, 1, "answered 503" if state == "failed" else None, sent.body)


@dataclass
class Run:
    """A run: three webhooks of one generation, all taken in order by a required target, and one DELETE."""

    told: list[Told] = field(
        default_factory=lambda: [
            told(_SENT["PROCESSING"], 1, status="PROCESSING"),
            told(_SENT["COMPLETED"], 11),
            told(_SENT["COMPLETED"], 12),
            told(_AGAIN, 21),
        ]
    )
    requests: list[Received] = field(
        default_factory=lambda: [
            got(_SENT["PROCESSING"], "d-1", 5, begun=None),
            got(_SENT["PROCESSING"], "d-1", 15, attempt=2),
            got(_SENT["COMPLETED"], "d-2", 16),
            got(_AGAIN, "d-3", 25),
        ]
    )
    rows: list[DeliveryRow] = field(
        default_factory=lambda: [row(_SENT["PROCESSING"], "d-1"), row(_SENT["COMPLETED"], "d-2"), row(_AGAIN, "d-3")]
    )
    deletions: list[Deletion] = field(default_factory=lambda: [Deletion("g-1", at=31, copied_at=30)])
    statuses: frozenset[str] | None = None
    is_required: bool = True

    def judged(self) -> Findings:
        """Judge it."""
        app = App()
        app.requests.extend(self.requests)
        inbox = Inbox("crm", app, FORWARD_SECRET, self.statuses, is_required=self.is_required)
        return judge_forwards(told=self.told, inboxes=[inbox], rows=self.rows, deletions=self.deletions)


def only(found: Findings, kind: str) -> Sequence[str]:
    """Return the sentences of *kind*; there must be no others."""
    mine: Sequence[str] = getattr(found, kind)
    assert list(mine) == found.all
    return mine


def test_a_run_in_which_all_arrives_in_order_before_the_delete_is_good():
    assert Run().judged().all == []


@pytest.mark.parametrize("at", [31.5, None])
def test_a_delete_before_the_2xx_of_a_webhook_accepted_before_its_copy_is_found(at: float | None):
    run = Run()
    run.requests[3] = replace(run.requests[3], begun_at=at, begun=None if at is None else 204)
    found = run.judged()

    assert len(found.unasked) == 1
    assert "before crm answered 2xx to the COMPLETED webhook of g-1" in found.unasked[0]
    assert found.unasked[0].endswith("it never has" if at is None else "it did so at 00:00:31.500000")


def test_a_webhook_accepted_after_the_copy_is_too_late_for_its_delete():
    run = Run(deletions=[Deletion("g-1", at=23, copied_at=21.4)])

    assert run.judged().all == []


def test_a_delete_waits_for_no_running_webhook_and_no_target_not_required():
    early = [Deletion("g-1", at=4, copied_at=3)]

    assert Run(deletions=early).judged().all == []
    assert Run(deletions=[Deletion("g-1", at=13, copied_at=12.9)], is_required=False).judged().all == []


def test_an_accepted_webhook_that_never_arrives_is_found():
    run = Run()
    del run.requests[3], run.rows[2]
    run.deletions.clear()
    found = only(run.judged(), "undelivered")

    assert len(found) == 2
    assert "has 0 deliveries to crm" in found[0]
    assert "never answered 2xx" in found[1]


def test_a_webhook_without_a_202_or_that_is_not_wanted_need_not_arrive():
    run = Run(statuses=frozenset({"COMPLETED"}))
    run.told[3] = replace(run.told[3], is_accepted=False)
    del run.requests[3], run.requests[:2], run.rows[2], run.rows[0]

    assert run.judged().all == []


def test_what_is_listed_as_failed_need_not_arrive_and_lets_others_pass():
    run = Run()
    run.requests[:2] = [got(_SENT["PROCESSING"], "d-1", 5, begun=410)]
    run.rows[0] = row(_SENT["PROCESSING"], "d-1", state="failed")

    assert run.judged().all == []


@pytest.mark.parametrize(("state", "says"), [("waiting", "still waits"), ("delivered", "is called delivered")])
def test_a_delivery_that_waits_or_is_called_delivered_untruly_is_found(state: str, says: str):
    run = Run(deletions=[])
    run.requests[3] = replace(run.requests[3], begun=503)
    run.rows[2] = row(_AGAIN, "d-3", state=state)
    found = only(run.judged(), "undelivered")

    assert [says in one for one in found] == [False, True]


def test_two_deliveries_of_one_webhook_are_found():
    run = Run()
    run.rows.append(row(_AGAIN, "d-4"))

    assert ["has 2 deliveries" in one for one in only(run.judged(), "undelivered")] == [True]


def test_a_later_webhook_that_arrives_first_is_found():
    run = Run()
    run.requests[1:3] = [got(_SENT["COMPLETED"], "d-2", 14), run.requests[1]]
    (found,) = only(run.judged(), "disordered")

    assert found.startswith("I12 crm took the COMPLETED webhook of g-1")
    assert "before the PROCESSING webhook of g-1" in found


def test_webhooks_sent_at_the_same_time_have_no_order():
    run = Run()
    run.told[0] = replace(run.told[0], answered_at=11.2)
    run.requests[1:3] = [got(_SENT["COMPLETED"], "d-2", 14), run.requests[1]]

    assert run.judged().all == []


def _changed(number: int, **changes: object) -> list[Received]:
    requests = Run().requests
    requests[number] = replace(requests[number], **changes)  # type: ignore[arg-type]
    return requests


_OTHERS_SIGNATURE = got(webhook(_AGAIN.body, at=1), "d-3", 25).headers


@pytest.mark.parametrize(
    ("requests", "says"),
    [
        (_changed(3, body=_AGAIN.body + b" "), "has a body that nobody sent"),
        (_changed(3, headers=_OTHERS_SIGNATURE), "a Sync-Signature that did not come with its body"),
        ([*Run().requests, got(_AGAIN, "d-2", 26, attempt=2)], "differs from an earlier attempt"),
        ([*Run().requests, got(_AGAIN, "d-9", 26, attempt=2)], "another Mayfly-Delivery than before: d-3"),
        ([*Run().requests, got(_AGAIN, "d-3", 26, attempt=1)], "a number that is none, or was another attempt's"),
        (_changed(3, headers=Run().requests[3].headers[:-1]), "is not what was signed"),
        (_changed(3, headers=(("Content-Type", "text/plain"), *Run().requests[3].headers[1:])), "another content type"),
    ],
    ids=["body", "signature", "delivery of another", "new delivery", "attempt", "unsigned", "content type"],
)
def test_a_request_that_is_not_what_came_in_is_found(requests: list[Received], says: str):
    run = Run()
    run.requests = requests
    found = run.judged()

    assert any(says in one for one in found.changed)
    assert found.disordered == []


def test_a_delivery_of_a_webhook_that_nobody_sent_is_found():
    run = Run()
    run.rows.append(row(webhook(id="g-2"), "d-8", state="failed"))

    assert only(run.judged(), "changed") == ["I11 delivery d-8 to crm is for no webhook"]
