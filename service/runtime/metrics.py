"""The metrics of one process, for Prometheus."""

from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The metrics of one process, in a registry of their own. Labels are closed sets; none comes from outside."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.webhooks = self._counter("webhooks", "Webhooks received, by answer.", "answer")
        self.signatures_refused = self._counter("signatures_refused", "Webhooks answered 401, by reason.", "reason")
        self.requests_refused = self._counter(
            "requests_refused",
            "Other requests that were refused, by status, or by what the server itself refused.",
            "reason",
        )
        self.statuses_unknown = self._counter(
            "statuses_unknown", "Webhooks with a status that this release does not know; they are ignored."
        )
        self.conflicts = self._counter(
            "conflicts", "Webhooks for a known generation with a different body; the first body is kept."
        )
        self.enqueue_failures = self._counter(
            "enqueue_failures", "Jobs that could not be enqueued; the safety net enqueues them again."
        )
        self.running = self._gauge("running", "1 for each side that this process runs, web or worker.", "side")
        self._make_workers()
        self._make_accounts()
        self.receive_seconds = Histogram(
            "mayfly_receive_seconds",
            "Time from the last byte of the first webhook of a commit until the commit is durable.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
            registry=self.registry,
        )
        self._make_ledger()

    def _make_ledger(self) -> None:
        self.oldest_overdue_seconds = self._gauge(
            "oldest_overdue_seconds", "Age of the most overdue deletion, read from the ledger."
        )
        self.due_records = self._gauge("due_records", "Records that are due, read from the ledger.")
        self.failed_records = self._gauge("failed_records", "Records given up, which need an operator.")
        self.held_records = self._gauge("held_records", "Records on hold, by what holds them.", "cause")
        self.batches_open = self._gauge(
            "batches_open", "Finished batches by state, without those that are resolved; read from the ledger.", "state"
        )
        self.ledger_up = self._gauge("ledger_up", "1 if the ledger answered when these gauges were last read, else 0.")
        self.sweep_complete_seconds = self._gauge(
            "sweep_complete_timestamp_seconds",
            "When a sweep last was complete, in seconds since 1970; 0 if never. Only of accounts that are swept.",
            "account",
        )
        self._make_forwards()
        self.pauses = self._gauge("pauses", "1 while deletions are paused for this reason.", "kind")

    def _make_forwards(self) -> None:
        self.forwards_waiting = self._gauge(
            "forwards_waiting", "Deliveries that wait for their next attempt; read from the ledger.", "target"
        )
        self.forwards_failed = self._gauge(
            "forwards_failed", "Deliveries given up, which need an operator; read from the ledger.", "target"
        )
        self.forward_oldest_waiting_seconds = self._gauge(
            "forward_oldest_waiting_seconds",
            "Age of the oldest delivery that waits, from its receipt or its last replay on; 0 without one.",
            "target",
        )

    def _make_accounts(self) -> None:
        self.account_paused = self._gauge("account_paused", "1 while deletions of this account are paused.", "account")
        self.account_overdue_seconds = self._gauge(
            "account_overdue_seconds", "Age of the most overdue deletion of this account.", "account"
        )

    def _make_workers(self) -> None:
        self.attempts = self._counter(
            "attempts", "Attempts to delete a generation, by the meaning of the API's answer.", "verdict"
        )
        self.looks = self._counter("looks", "Early looks, by the meaning of the API's answer.", "verdict")
        self.api_calls = self._counter(
            "api_calls", "Calls to the Sync API, by method and status class.", "method", "status"
        )
        self.settlements = self._counter("settlements", "Attempts to delete, by what became of the record.", "result")
        self.deletion_lag_seconds = Histogram(
            "mayfly_deletion_lag_seconds",
            "Time from the due time of a record until its deletion was committed.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 86400),
            registry=self.registry,
        )
        self.attempts_running = self._gauge(
            "attempts_running", "Attempts to delete in progress in this process.", "account"
        )
        self.budget_waiting = self._gauge(
            "budget_waiting", "Due jobs of this process that wait for the API's budget.", "account"
        )
        self.worker_round_seconds = self._gauge(
            "worker_round_timestamp_seconds",
            "When the loop of a worker in this process began its last round, in seconds since 1970.",
            "account",
        )
        self.sweep_adopted = self._counter(
            "sweep_adopted", "Generations that a sweep adopted, because no webhook told of them."
        )
        self.sweep_unreadable = self._counter(
            "sweep_unreadable", "Items in the API's lists that are no generations; they are not adopted."
        )
        self.batches = self._counter("batches", "Looks at finished batches, by what became of the batch.", "state")
        self._make_targets()
        self.loops_failed = self._counter("loops_failed", "Failed rounds of a background loop.", "loop")

    def _make_targets(self) -> None:
        self.forwards = self._counter(
            "forwards", "Attempts to bring a webhook to a target, by what became of the delivery.", "target", "outcome"
        )
        self.forward_seconds = Histogram(
            "mayfly_forward_seconds",
            "Time from the receipt of a webhook until its target has taken it.",
            ("target",),
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 1800, 7200, 86400),
            registry=self.registry,
        )
        self.forward_circuit = self._gauge(
            "forward_circuit",
            "1 while a target does not answer, and one webhook is tried each half a minute.",
            "target",
        )

    def last_round(self) -> datetime | None:
        """Return when the loop furthest behind, of all accounts, began its last round; None before the first."""
        begun = [sample.value for family in self.worker_round_seconds.collect() for sample in family.samples]
        return datetime.fromtimestamp(min(begun), UTC) if begun else None

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mayfly_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"mayfly_{name}", text, labels, registry=self.registry)
