"""The metrics of one process, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The counters of one process, in a registry of their own. No label comes from outside; sets are closed."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.webhooks = self._counter("webhooks", "Webhooks received, by how they were answered.", "answer")
        self.signatures_refused = self._counter("signatures_refused", "Webhooks refused with 401, by why.", "reason")
        self.statuses_unknown = self._counter(
            "statuses_unknown", "Webhooks with a status this release does not know; they are ignored."
        )
        self.conflicts = self._counter(
            "conflicts", "Webhooks for a known generation with another body; the first is kept."
        )
        self.enqueue_failures = self._counter(
            "enqueue_failures", "Jobs that Redis did not take; the safety net enqueues them again."
        )
        self.attempts = self._counter(
            "attempts", "Attempts to delete a generation, by what the API's answer means.", "verdict"
        )
        self.api_calls = self._counter(
            "api_calls", "Calls to the Sync API, by method and status class.", "method", "status"
        )
        self.loops_failed = self._counter("loops_failed", "Rounds of a background loop that failed.", "loop")
        self.receive_seconds = Histogram(
            "mayfly_receive_seconds",
            "From the last byte of the first webhook of each commit to that commit being durable.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
            registry=self.registry,
        )
        self.oldest_overdue_seconds = self._gauge(
            "oldest_overdue_seconds", "How long the longest waiting record is overdue, read from the ledger."
        )
        self.due_records = self._gauge("due_records", "Records whose time has come, read from the ledger.")
        self.failed_records = self._gauge("failed_records", "Records given up, which wait for a person.")
        self.ledger_up = self._gauge(
            "ledger_up", "Whether the ledger answered when it was last asked for these gauges."
        )
        self.pauses = self._gauge("pauses", "Reasons for which deletions are paused, 1 while it holds.", "kind")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mayfly_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"mayfly_{name}", text, labels, registry=self.registry)
