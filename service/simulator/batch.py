"""One batch as the Sync API shows it.

Source: sync.so docs, "Batch processing", and the payload reference "Batch status update": ``created_at`` beside
``outputUrl`` and ``webhookUrl``, and an ``outputUrl`` from the start.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from service.simulator.generation import UNFINISHED, Generation, wire_instant

STATUSES = ("PENDING", "JOBS_CREATED", "PROCESSING", "COMPLETED", "FAILED")


@dataclass(slots=True)
class Batch:
    """A batch; *generations* are in the order of its lines, whose ids are *request_ids*."""

    id: str
    created_at: datetime
    token: str
    url: str
    webhook_url: str | None
    request_ids: list[str]
    generations: list[Generation] = field(default_factory=list)  # empty until the jobs are created
    status: str = "PENDING"
    results: bytes | None = None  # the results file, written once at the end

    @property
    def is_finished(self) -> bool:
        return self.results is not None

    @property
    def results_url(self) -> str:
        """The signed URL in the storage that ``outputUrl`` leads to."""
        return f"{self.url}/storage/batches/{self.id}/results.jsonl?signature={self.token}"

    def body(self) -> dict[str, object]:
        """Return the wire body of answers and of the webhook."""
        ended = Counter(item.status for item in self.generations if item.status not in UNFINISHED)
        return {
            "id": self.id,
            "created_at": wire_instant(self.created_at),
            "status": self.status,
            "metrics": {
                "total_generations": len(self.request_ids),
                "success_count": ended["COMPLETED"],
                "failed_count": ended.total() - ended["COMPLETED"],
                "pending_count": len(self.request_ids) - ended.total(),
            },
            "outputUrl": f"{self.url}/v2/batch/{self.id}/result?token={self.token}",
            "webhookUrl": self.webhook_url,
        }
