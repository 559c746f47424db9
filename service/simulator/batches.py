"""``/v2/batch``: many generations from one file, their results in another, and one webhook at the end.

Source: sync.so docs, "Batch processing", "Batch status update", and the types of the Python SDK. Undocumented, and
assumed here: a batch is FAILED only if none of its generations completed; each line of the results has the
``request_id`` and the ``generation`` as it was at the end. ``Switches.lists_batches`` says whether they are listed.
"""

import asyncio
from datetime import UTC, datetime
from typing import Any

import msgspec

from service.simulator.answers import Answer, RefusedError, error, invalid, json_answer
from service.simulator.batch import STATUSES, Batch
from service.simulator.creating import add_new
from service.simulator.creation import decode_json, problems_of, read_creation, url_problem
from service.simulator.forms import Form, is_form, read_form
from service.simulator.media import BATCH_NOT_FOUND
from service.simulator.organisation import Organisation
from service.simulator.requests import Request

LINES = range(20, 501)
MAX_BYTES = 5 << 20
_ENDPOINT = "/v2/generate"


class BatchRoutes:
    """Create, get and list."""

    def __init__(self, organisation: Organisation) -> None:
        self._organisation = organisation

    def create(self, request: Request) -> Answer:
        if not is_form(request):
            raise invalid("input", "the body must be a multipart form with the file input")
        form = read_form(request)
        webhook_url = form.text("webhook_url")
        if webhook_url is not None and (problem := url_problem(webhook_url)):
            raise invalid("webhook_url", f"webhook_url {problem}")
        if form.text("dry_run") not in (None, "true", "false"):
            raise invalid("dry_run", "dry_run must be true or false")
        lines = _read_lines(form)
        if form.text("dry_run") == "true":
            return json_answer(200, {"status": "VALIDATED"})
        batch = Batch(
            id=f"batch_{self._organisation.new_id().replace('-', '')[:12]}",
            created_at=datetime.now(UTC),
            token=self._organisation.new_id(),
            url=self._organisation.url,
            webhook_url=webhook_url,
            request_ids=[line["request_id"] for line in lines],
        )
        self._organisation.batches[batch.id] = batch
        payloads = [line["payload"] for line in lines]
        self._organisation.start(self._process(batch, payloads, request.header(b"x-sync-source")))
        return json_answer(201, batch.body())

    def get(self, request: Request) -> Answer:
        batch = self._organisation.batches.get(request.id)
        return BATCH_NOT_FOUND if batch is None else json_answer(200, batch.body())

    def list_batches(self, request: Request) -> Answer:
        query = request.query
        statuses = query.several("status", known=STATUSES)
        after, before = query.instant("created_after"), query.instant("created_before")
        found = [
            batch.body()
            for batch in sorted(self._organisation.batches.values(), key=lambda batch: batch.created_at, reverse=True)
            if (statuses is None or batch.status in statuses)
            and (after is None or batch.created_at > after)
            and (before is None or batch.created_at < before)
        ]
        return json_answer(200, found)

    async def _process(self, batch: Batch, payloads: list[object], source: str | None) -> None:
        """Make the generations and follow them to their end; then write the results and send the webhook."""
        seconds = self._organisation.switches.processing_seconds
        await asyncio.sleep(seconds * 0.1)
        for payload in payloads:
            new = read_creation(payload)
            batch.generations.append(add_new(self._organisation, new, source=source, batch_id=batch.id))
        batch.status = "JOBS_CREATED"
        await asyncio.sleep(seconds * 0.1)
        batch.status = "PROCESSING"
        await asyncio.gather(*(generation.wait_until_ended(86_400) for generation in batch.generations))
        batch.results = b"\n".join(
            msgspec.json.encode({"request_id": request_id, "generation": generation.body()})
            for request_id, generation in zip(batch.request_ids, batch.generations, strict=True)
        )
        has_success = any(generation.status == "COMPLETED" for generation in batch.generations)
        batch.status = "COMPLETED" if has_success else "FAILED"
        if batch.webhook_url is not None:
            await self._organisation.send(batch.id, batch.webhook_url, msgspec.json.encode(batch.body()))


def _read_lines(form: Form) -> list[dict[str, Any]]:
    """Return the lines of the file ``input``. Raises: RefusedError with a message for each line that is wrong."""
    files = form.files.get("input") or []
    if len(files) != 1:
        raise invalid("input", "input must be one file in JSON lines")
    if len(files[0].content) > MAX_BYTES:
        raise invalid("input", "input must be at most 5 MB")
    texts = [line for line in files[0].content.splitlines() if line.strip()]
    if len(texts) not in LINES:
        raise invalid("input", f"input must have {LINES.start} to {LINES.stop - 1} lines, not {len(texts)}")
    lines: list[dict[str, Any]] = []
    seen: set[str] = set()
    messages: list[str] = []
    for number, text in enumerate(texts, 1):
        messages += [f"line {number}: {problem}" for problem in _line_problems(text, seen, lines)]
    if messages:
        raise RefusedError(error(400, messages, error="Bad Request", field="input"))
    return lines


def _line_problems(text: bytes, seen: set[str], lines: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with a line; append it to *lines* if nothing is."""
    try:
        line = decode_json(text, "the line")
    except RefusedError:
        return ["not JSON"]
    if not isinstance(line, dict) or not isinstance(line.get("request_id"), str) or not line["request_id"]:
        return ["request_id must be a string"]
    if line["request_id"] in seen:
        return [f"request_id {line['request_id'][:40]} is there twice"]
    seen.add(line["request_id"])
    if line.get("endpoint") != _ENDPOINT:
        return [f"endpoint must be {_ENDPOINT}"]
    problems = [f"payload: {problem}" for problem in problems_of(line.get("payload"))]
    if not problems:
        lines.append(line)
    return problems
