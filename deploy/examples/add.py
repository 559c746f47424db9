"""Tells Mayfly which generations to delete and when, by their ids; their webhooks stay where they are.

pip install httpx && python add.py ID…
"""

import os
import sys

import httpx

mayfly = httpx.Client(
    base_url=os.environ["MAYFLY_PUBLIC_URL"],
    headers={"Authorization": f"Bearer {os.environ['MAYFLY_INTAKE_TOKEN']}"},
    timeout=10,
    transport=httpx.HTTPTransport(retries=3),  # of connections
)


def add(generation_id: str, **options: object) -> dict[str, object]:
    """Schedule one generation, with ttl, expires or hold, and labels, as soon as it is created.

    Raises: httpx.HTTPError. Call it again then: of two calls the later due time counts, and a hold.
    """
    answer = mayfly.post("/api/records", json={"id": generation_id, **options})
    answer.raise_for_status()
    record: dict[str, object] = answer.json()
    return record


if __name__ == "__main__":
    for generation_id in sys.argv[1:]:
        record = add(generation_id, ttl="72h", labels={"customer": "acme"})
        print(record["id"], record["state"], record["dueAt"])
