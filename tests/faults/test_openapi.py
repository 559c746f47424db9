"""Rows 29 to 48 at every route: what the service's own OpenAPI promises, held against requests made from it."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.faults.processes import Nursery
from tests.faults.system import TOKEN
from tests.faults.website import website

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_every_route_keeps_what_the_openapi_promises_whatever_is_asked(
    nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
):
    seen = set()
    with website(nursery, tmp_path_factory.mktemp("openapi")) as site:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{site.port}/schema/openapi.json")
        for found in schema.get_all_operations():
            operation: Any = found.ok()  # type: ignore[union-attr] # an invalid one would raise here

            @FUZZ
            @given(case=operation.as_strategy())
            def keeps_its_promise(case: Any) -> None:  # noqa: ANN401 - a type with five parameters
                case.call_and_validate(headers={"authorization": f"Bearer {TOKEN}"}, checks=CHECKS)

            keeps_its_promise()
            seen.add(operation.label)

        assert site.process.exit_code is None
        assert site.process.events("request.crashed") == []
    assert {"POST /webhooks/sync", "GET /api/records", "GET /health/ready", "POST /api/pause"} <= seen
