"""Rows 29 to 48: bad headers, bodies and ids at a real web side; see also tests/unit.

No input may cause a 5xx, a record without a valid signature, or a slow answer.
"""

import gzip
import json
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.core.signature import SignatureError, verify
from tests.faults.system import TOKEN
from tests.faults.website import Website, website
from tests.support.webhooks import SECRET, notification, signature, webhook

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same inputs in each run: what fails here fails everywhere
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from([*notification(), "errorCode", "metrics", "projectId", "segments", "synthesizedAudioUrl"])


@pytest.fixture(scope="module")
def site(starter: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Website]:  # noqa: ANN401
    """One web side for all of them, with no Redis: nothing here may need one."""
    with website(starter, tmp_path_factory.mktemp("bad")) as site:
        yield site


@FUZZ
@given(header=st.binary(max_size=300).filter(lambda text: not set(text) & set(b"\r\n\0")))
def test_no_malformed_signature_header_is_accepted_or_causes_an_error(site: Website, header: bytes):
    body = webhook().body
    status = site.raw(
        b"POST", b"/webhooks/sync", body, {b"content-type": b"application/json", b"sync-signature": header}
    )

    assert status in (400, 401)


@FUZZ
@given(
    t=st.text(max_size=12) | st.integers().map(str),
    v1=st.lists(st.text(max_size=70) | st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=20),
)
def test_no_generated_time_and_digest_is_a_valid_signature(site: Website, t: str, v1: list[str]):
    text = ",".join([f"t={t}", *(f"v1={one}" for one in v1)])
    header = "".join(letter for letter in text if letter not in "\r\n\0").encode()
    status = site.raw(b"POST", b"/webhooks/sync", webhook().body, {b"sync-signature": header})

    assert status in (400, 401)


HUGE = {
    "long": b"t=1" + b",v1=" + b"a" * 3000,
    "digests": b"t=1" + b",v1=" * 5000,
    "right digests": b"t=1" + (b",v1=" + b"a" * 64) * 400,
    "commas": b"," * 10_000,
    "names": b"v1=" * 10_000,
    "times": b"t=1," * 7_000,
    "digits": b"t=" + b"1" * 400,
    "not ascii": b"\xff" * 2000,
    "signs": b"=" * 4096,
}


@pytest.mark.parametrize("header", HUGE.values(), ids=HUGE)
def test_a_huge_signature_header_is_refused_within_five_milliseconds(site: Website, header: bytes):
    text, body, now = header.decode("latin-1"), webhook().body, datetime.now(UTC)

    def refused() -> float:
        begun = time.perf_counter()
        with pytest.raises(SignatureError):
            verify(text, body, secrets=[SECRET.encode()] * 3, now=now, tolerance=timedelta(days=36500))
        return time.perf_counter() - begun

    assert min(refused() for _ in range(20)) < 0.005  # the quickest: others use this machine as well
    assert site.raw(b"POST", b"/webhooks/sync", body, {b"sync-signature": header}) in (400, 401, 431)


def test_a_header_of_a_megabyte_ends_only_its_connection(site: Website):
    assert site.raw(b"POST", b"/webhooks/sync", b"{}", {b"sync-signature": b"x" * 2**20}) in (400, 401, 431, None)
    assert site.client.get("/health/live").status_code == 200


@pytest.mark.parametrize("is_first", [True, False])
def test_of_two_signature_headers_the_first_counts_and_must_sign_the_body(site: Website, *, is_first: bool):
    sent = webhook()
    signatures = [signature(sent.body).encode(), signature(b"another body").encode()]
    pairs = [(b"sync-signature", value) for value in (signatures if is_first else reversed(signatures))]
    status = site.raw(b"POST", b"/webhooks/sync", sent.body, pairs)

    assert status == (202 if is_first else 401)


@FUZZ
@given(body=st.binary(max_size=400) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_signed_body_causes_an_error(site: Website, body: bytes):
    answer = site.post(body)

    assert answer.status_code in (202, 400)


@FUZZ
@given(field=FIELDS, value=JSON)
def test_no_field_value_causes_an_error_and_a_stored_record_can_be_read(
    site: Website,
    field: str,
    value: Any,  # noqa: ANN401 - any JSON
):
    sent = notification(**{field: value})
    answer = site.post(json.dumps(sent).encode())

    assert answer.status_code in (202, 400)
    if answer.status_code == 202 and answer.json()["state"] not in ("ignored", "batch"):
        record = site.record(answer.json()["id"])
        assert record.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xef\xbb\xbf{}",
        b'{"id": "\xff"}',
        b"[" * 100_000,
        b'{"id":"x","status":"COMPLETED","input":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"id":"x","status":"COMPLETED","outputDuration":1e999}',
        b'{"id":"x","status":"COMPLETED","outputDuration":NaN}',
        b'{"id":"x","status":"COMPLETED","outputDuration":' + b"9" * 5000 + b"}",
        b'{"id":"x","status":"COMPLETED"} trailing',
        b'{"id":"x","status":"COMPLETED","id":"y"}',
        b'{"id":"x","status":"FAILED","status":"COMPLETED"}',
        b'{"id":"x","\\u0069d":"y","status":"COMPLETED"}',
        b'{"id":"\\ud800","status":"COMPLETED"}',
        b'{"id":"\\u0000","status":"COMPLETED"}',
        b'{"id":"","status":"COMPLETED"}',
        b'{"id":"..","status":"COMPLETED"}',
        b'{"id":"a\\nb","status":"COMPLETED"}',
        json.dumps({"id": "x" * 10_000, "status": "COMPLETED"}).encode(),
        '{"id":"x","status":"COMPLETED"}'.encode("utf-16"),
    ],
    ids=range(22),
)
def test_a_body_that_json_readers_interpret_differently_is_refused(site: Website, body: bytes):
    before = site.count()

    assert site.post(body).status_code == 400
    assert site.count() == before


@FUZZ
@given(generation_id=st.text(max_size=300))
def test_an_id_is_refused_or_stored_unchanged(site: Website, generation_id: str):
    raw = json.dumps(notification(id=generation_id)).encode()
    answer = site.post(raw)

    assert answer.status_code in (202, 400)
    if answer.status_code == 202:
        assert answer.json()["id"] == generation_id
        assert generation_id not in ("", ".", "..")
        if "/" not in generation_id:
            assert site.record(generation_id).json()["id"] == generation_id


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING", "COMPLETED_BUT_NEW", "completed", "ARCHIVED"])
def test_a_status_that_is_unknown_or_not_terminal_makes_no_record(site: Website, status: str):
    before = site.count()
    answer = site.post(json.dumps(notification(status=status, isNew={"yes": [1]})).encode())

    assert (answer.status_code, answer.json()["state"]) == (202, "ignored")
    assert site.count() == before


def test_a_processing_webhook_after_the_end_leaves_the_record_scheduled(site: Website):
    done = notification()
    assert site.post(json.dumps(done).encode()).json()["state"] == "scheduled"
    assert site.post(json.dumps(done | {"status": "PROCESSING"}).encode()).json()["state"] == "ignored"

    assert site.record(str(done["id"])).json()["state"] == "scheduled"


def test_a_second_terminal_webhook_keeps_the_first_and_never_shortens_the_ttl(site: Website):
    first = notification(webhookUrl="https://hooks.example.com/webhooks/sync?ttl=72h")
    due_at = site.post(json.dumps(first).encode()).json()["dueAt"]
    again = first | {"status": "FAILED", "webhookUrl": "https://hooks.example.com/webhooks/sync?ttl=1h"}
    answer = site.post(json.dumps(again).encode())

    record = site.record(str(first["id"])).json()
    assert answer.status_code == 202
    assert (record["status"], record["dueAt"]) == ("COMPLETED", due_at)
    assert site.metric("mayfly_conflicts_total") >= 1


@pytest.mark.parametrize("state", ["scheduled", "deleted"])
def test_a_webhook_resent_days_later_with_a_new_signature_is_a_duplicate(site: Website, state: str):
    sent = webhook(at=time.time() - 200)
    assert site.client.post("/webhooks/sync", content=sent.body, headers=sent.headers).status_code == 202
    before = site.count()
    days = int(timedelta(days=3) / timedelta(microseconds=1))
    site.write(
        "UPDATE records SET received_at = received_at - ?, due_at = due_at - ?, state = ? WHERE id = ?",
        (days, days, state, sent.id),
    )
    again = site.post(sent.body)  # signed now: a later t than the first
    record = site.record(sent.id).json()

    assert site.count() == before
    assert (again.status_code, again.json()["state"], record["state"]) == (202, state, state)
    if state == "scheduled":  # of two announcements the later due time wins
        assert abs(datetime.fromisoformat(record["dueAt"]) - datetime.now(UTC) - timedelta(days=1)).seconds < 5
    assert datetime.now(UTC) - datetime.fromisoformat(record["receivedAt"]) > timedelta(days=3)


SIGNED = webhook()
OTHER_BYTES = {
    "written anew": json.dumps(json.loads(SIGNED.body), indent=2).encode(),
    "without blanks": json.dumps(json.loads(SIGNED.body), separators=(",", ":")).encode(),
    "sorted": json.dumps(json.loads(SIGNED.body), sort_keys=True).encode(),
    "a line more": SIGNED.body + b"\n",
    "a line before": b"\n" + SIGNED.body,
    "a mark before": b"\xef\xbb\xbf" + SIGNED.body,
    "packed": gzip.compress(SIGNED.body),
    "in capitals": SIGNED.body.upper(),
    "a byte less": SIGNED.body[:-1],
}


@pytest.mark.parametrize("body", OTHER_BYTES.values(), ids=OTHER_BYTES)
def test_a_valid_signature_does_not_verify_other_bytes(site: Website, body: bytes):
    before = site.count()
    headers = {"Content-Type": "application/json", "Sync-Signature": signature(SIGNED.body)}
    packed = headers | {"Content-Encoding": "gzip"} if body[:2] == b"\x1f\x8b" else headers

    assert body != SIGNED.body
    assert site.client.post("/webhooks/sync", content=body, headers=packed).status_code == 401
    assert site.count() == before


def test_a_signature_verifies_its_exact_bytes_in_any_json_formatting(site: Website):
    for name in ("written anew", "without blanks", "a line more"):
        assert site.post(OTHER_BYTES[name]).status_code == 202, name


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])
def test_another_method_is_405(site: Website, method: str):
    assert site.client.request(method, "/webhooks/sync").status_code in (405, 204 if method == "OPTIONS" else 405)


@FUZZ
@given(path=st.text(max_size=60))
def test_no_path_causes_an_error(site: Website, path: str):
    status = site.raw(b"GET", b"/" + quote(path).encode(), b"", {})

    assert status is not None
    assert status < 500


@FUZZ
@given(line=st.binary(max_size=200))
def test_no_bytes_on_the_socket_cause_an_error(site: Website, line: bytes):
    with socket.create_connection(("127.0.0.1", site.port), timeout=5) as connection:
        connection.sendall(line + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").readline()

    assert not answer.startswith(b"HTTP/1.1 5")


def test_the_web_side_is_healthy_after_all_bad_requests(site: Website):
    answer = site.client.get("/api/records", headers={"authorization": f"Bearer {TOKEN}"}, params={"limit": 500})

    assert answer.status_code == 200
    assert site.process.exit_code is None
    assert site.process.events("request.crashed") == []
    assert isinstance(site.client, httpx.Client)
