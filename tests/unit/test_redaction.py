"""Secrets are masked in log events, also in those of libraries."""

import pytest

from service.runtime.logging import redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://api.sync.so/result?token=9b6d0c11 failed", "GET https://api.sync.so/result?token=… failed"),
        ("url='x?a=1&TOKEN=9b6d&b=2'", "url='x?a=1&TOKEN=…&b=2'"),
        ("secret whsec_0123456789abcdef, next", "secret whsec_…, next"),
        ("{'x-api-key': 'sk-live-1'}", "{'x-api-key': '…'}"),
        ("X-Api-Key: sk-live-1", "X-Api-Key: …"),
        ("redis://:hunter2@redis:6379/0", "redis://:…@redis:6379/0"),
        ("postgresql://mayfly:hunter2@db/mayfly", "postgresql://mayfly:…@db/mayfly"),
    ],
)
def test_a_secret_in_a_text_is_masked(text, shown):
    assert redact(None, "info", {"event": text, "error": text}) == {"event": shown, "error": shown}


@pytest.mark.parametrize("text", ["cleanup.confirmed", "https://api.sync.so/v2", "a@b", "token", "12:30:00"])
def test_other_texts_stay_as_they_are(text):
    assert redact(None, "info", {"event": text}) == {"event": text}


def test_numbers_and_flags_pass():
    assert redact(None, "info", {"event": "x", "attempt": 3, "dry_run": True}) == {
        "event": "x",
        "attempt": 3,
        "dry_run": True,
    }
