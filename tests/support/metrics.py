"""Reading /metrics as Prometheus does."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


async def numbers_of(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Return the samples of /metrics by name and labels."""
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["content-type"].count("charset") == 1
    families = text_string_to_metric_families(answer.text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
