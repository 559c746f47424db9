"""Batches: the notification, the lines of the results, what one look adds up to, and which addresses are public."""

import json
import random

import pytest

from service.core.batch import MAX_LINES, Line, Tally, is_finished_batch, is_public, read_batch, read_line
from service.core.generation import read_generation
from tests.support.webhooks import batch, notification

ID = "3f1c2a9e-7b54-4c1d-9a53-0d2f6f1b8e11"


def read(**changes):
    body = json.dumps(batch() | changes).encode()
    return read_batch(read_generation(body), body)


def line(**fields):
    return read_line(json.dumps(fields).encode())


def test_the_notification_is_read_in_both_spellings():
    found = read()
    other = read(created_at=None, createdAt="2026-10-24T06:00:00Z")

    assert (found.id, found.status, found.total) == ("batch_abc123", "COMPLETED", 40)
    assert found.created_at == other.created_at
    assert found.output_url.endswith("token=f0c1a2b3")


@pytest.mark.parametrize("metrics", [{}, {"total_generations": None}, {"total_generations": -1}, 7, "x"])
def test_a_number_of_generations_that_is_none_is_not_known(metrics):
    assert read(metrics=metrics).total is None


@pytest.mark.parametrize("text", ["", "yesterday", 7, None, "2026-10-24T06:00:00"])
def test_a_time_of_creation_that_is_none_is_not_known(text):
    assert read(created_at=text).created_at is None


@pytest.mark.parametrize(
    ("status", "is_finished"),
    [("COMPLETED", True), ("FAILED", True), ("PROCESSING", False), ("JOBS_CREATED", False), ("NEW", False)],
)
def test_only_a_batch_that_has_ended_is_finished(status, is_finished):
    assert is_finished_batch(read_generation(json.dumps(batch() | {"status": status}).encode())) is is_finished
    assert not is_finished_batch(read_generation(json.dumps(notification(status=status)).encode()))


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": "r1", "generation": notification(id=ID)},
        {"request_id": "r1", "generation": notification(id=ID, status="FAILED", error="x", errorCode="y")},
        {"request_id": "r1", "result": notification(id=ID)},
        {"custom_id": "r1", "id": "line_7", "response": {"status_code": 200, "body": notification(id=ID)}},
        {"request_id": "r1", "error": None, "data": {"generation": notification(id=ID)}},
        notification(id=ID) | {"request_id": "r1"},
    ],
)
def test_a_generation_is_found_wherever_it_is_likely_to_be(fields):
    found = line(**fields)

    assert found.generation is not None
    assert (found.generation.id, found.is_ended, found.is_error) == (ID, True, False)


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": "r1", "generation_id": ID},
        {"request_id": "r1", "generationId": ID, "error": {"message": "boom"}},
        {"request_id": "r1", "generation": {"id": ID}},
        {"request_id": "r1", "generation": {"id": ID, "status": "COMPLETED"}},
        {"request_id": "r1", "generation": notification(id=ID, status="PROCESSING")},
        {"request_id": "r1", "generation": notification(id=ID, status="ARCHIVED")},
    ],
)
def test_of_a_generation_that_is_not_known_to_have_ended_the_id_is_found(fields):
    found = line(**fields)

    assert found.generation is not None
    assert (found.generation.id, found.is_ended) == (ID, False)


@pytest.mark.parametrize("error", ["boom", {"message": "boom"}, ["boom"], True])
def test_an_error_without_a_generation_is_an_error(error):
    assert line(request_id="r1", error=error) == Line(is_error=True)
    assert line(request_id="r1", response={"error": error}) == Line(is_error=True)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"request_id":"r1"}',
        b'{"id":"line_7","status":"COMPLETED"}',
        b'{"request_id":"r1","error":null}',
        b'{"request_id":"r1","generation":{"id":"..","model":"x","status":"COMPLETED"}}',
        b'{"request_id":"r1","generation_id":7}',
        b'{"request_id":"r1","response":{"id":"resp_7","status_code":200}}',
        b'{"a":"\xff"}',
        b"[" * 100_000,
        b'{"generation":' * 5_000 + b"1" + b"}" * 5_000,
        json.dumps({"generation": batch() | {"model": "x"}}).encode(),
    ],
    ids=range(14),
)
def test_what_cannot_be_read_is_neither(raw):
    assert read_line(raw).generation is None
    assert not read_line(raw).is_error


def test_no_line_raises_whatever_its_bytes_are():
    choose = random.Random(7)  # noqa: S311 - no secret
    good = json.dumps({"request_id": "r1", "generation": notification(id=ID)}).encode()
    for _ in range(3000):
        raw = bytearray(good)
        for _ in range(choose.randint(1, 6)):
            raw[choose.randrange(len(raw))] = choose.randrange(256)
        read_line(bytes(raw))


@pytest.mark.parametrize(
    ("tally", "missing", "unresolved"),
    [
        (Tally(40, found=40, errors=0, unread=0, pending=0, has_results=True), 0, 0),
        (Tally(40, found=38, errors=2, unread=0, pending=0, has_results=True), 0, 0),
        (Tally(40, found=38, errors=0, unread=2, pending=0, has_results=True), 2, 2),
        (Tally(40, found=38, errors=0, unread=1, pending=3, has_results=True), 2, 5),
        (Tally(40, found=40, errors=0, unread=5, pending=0, has_results=True), 0, 5),
        (Tally(40, found=60, errors=0, unread=0, pending=0, has_results=False), 0, 0),
        (Tally(None, found=3, errors=0, unread=0, pending=0, has_results=True), 0, 0),
        (Tally(None, found=3, errors=0, unread=0, pending=0, has_results=False), 1, 1),
        (Tally(0, found=0, errors=0, unread=0, pending=0, has_results=False), 0, 0),
        (Tally(MAX_LINES, found=0, errors=0, unread=0, pending=0, has_results=False), MAX_LINES, MAX_LINES),
    ],
)
def test_what_is_not_accounted_for_is_unresolved(tally, missing, unresolved):
    assert (tally.missing, tally.unresolved) == (missing, unresolved)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::7f00:1"),
        *("64:ff9b:1::a9fe:a9fe", "", "localhost", "127.1", "2130706433"),
    ],
)
def test_no_address_of_a_private_network_is_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "52.216.0.1", "2606:4700::6810:84e5", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)
