"""HTTP as a hostile or a broken client speaks it, byte by byte, to a real web side."""

import contextlib
import json
import re
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import pytest

from tests.faults.website import Website, website
from tests.support.webhooks import Webhook, webhook

# The answer to it ends the connection.
LAST = b"GET /health/live HTTP/1.1\r\nHost: mayfly\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def site(starter: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Website]:  # noqa: ANN401
    """One web side for all of them."""
    with website(starter, tmp_path_factory.mktemp("http")) as site:
        yield site


def request(sent: Webhook, *headers: bytes, has_length: bool = True, body: bytes | None = None) -> bytes:
    """Return the bytes of a signed webhook with more *headers*, and with *body* in place of its own."""
    lines = [
        b"POST /webhooks/sync HTTP/1.1",
        b"Host: mayfly",
        b"Content-Type: application/json",
        b"Sync-Signature: " + sent.headers["Sync-Signature"].encode(),
        *headers,
    ]
    if has_length:
        lines.append(b"Content-Length: %d" % len(sent.body))
    return b"\r\n".join([*lines, b"", b""]) + (sent.body if body is None else body)


def chunked(sent: Webhook, *headers: bytes, body: bytes) -> bytes:
    """Return the same with *body*, which has the form of chunks."""
    return request(sent, *(headers or [b"Transfer-Encoding: chunked"]), has_length=False, body=body)


def connect(site: Website) -> socket.socket:
    return socket.create_connection(("127.0.0.1", site.port), timeout=10)


def exchange(site: Website, *parts: bytes) -> bytes:
    """Send *parts* and return all that comes until the server closes; TimeoutError if it does not."""
    with connect(site) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    answers = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            answers += part
    return answers


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answers)]


def is_stored(site: Website, sent: Webhook) -> bool:
    """Whether there is a record of it, after all that arrived before was handled."""
    assert site.post(webhook().body).status_code == 202
    return site.record(sent.id).status_code == 200


def reset(connection: socket.socket) -> None:
    """Close with RST in place of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def open_connections(site: Website) -> int:
    """Count the connections that the web side holds for clients."""
    found = psutil.Process(site.process.pid).net_connections("tcp")
    return sum(one.laddr.port == site.port and one.status != psutil.CONN_LISTEN for one in found)


def wait_for_connections(site: Website, number: int) -> None:
    """Wait until only so many are left."""
    deadline = time.monotonic() + 10
    while (now := open_connections(site)) > number:
        assert time.monotonic() < deadline, f"{now} connections are left"
        time.sleep(0.05)


# Pipelining


def test_pipelined_webhooks_are_answered_in_order_and_each_is_stored_once(site: Website):
    before = site.count()
    sent = [webhook() for _ in range(100)]
    answers = exchange(site, b"".join(request(one) for one in sent), LAST)

    assert statuses(answers) == [202] * 100 + [200]
    assert re.findall(rb'"id":"([^"]+)"', answers) == [one.id.encode() for one in sent]
    assert site.count() == before + 100


def test_a_refused_request_among_pipelined_ones_is_answered_in_its_place(site: Website):
    good, bad = [webhook(), webhook()], webhook(secret="whsec_of_nobody_0123456789abcdef0123456789")
    unknown = b"GET /nothing HTTP/1.1\r\nHost: mayfly\r\n\r\n"
    answers = exchange(site, request(good[0]) + request(bad) + unknown + request(good[1]) + LAST)

    assert statuses(answers) == [202, 401, 404, 202, 200]
    assert [is_stored(site, one) for one in (*good, bad)] == [True, True, False]


def test_webhooks_that_arrive_in_pieces_of_seven_bytes_are_stored(site: Website):
    sent = [webhook(), webhook()]
    data = request(sent[0]) + chunked(sent[1], body=as_chunks(sent[1].body, 5)) + LAST
    answers = exchange(site, *(data[start : start + 7] for start in range(0, len(data), 7)))

    assert statuses(answers) == [202, 202, 200]
    assert all(is_stored(site, one) for one in sent)


def test_what_is_no_http_after_a_webhook_ends_the_connection(site: Website):
    """Its answer may be the 400, so that it is sent again; a 202 is true in any case."""
    for _ in range(20):
        sent = webhook()
        answers = statuses(exchange(site, request(sent) + b"\x16\x03\x01\r\n\r\n" + LAST))

        assert answers in ([400], [202, 400])
        assert is_stored(site, sent) or 202 not in answers


def as_chunks(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])


# Smuggling: where a message ends is never in doubt


FRAMING: dict[str, Sequence[bytes]] = {
    "length and chunks": [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
    "chunks and length": [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
    "two lengths": [b"Content-Length: 0", b"Content-Length: 5"],
    "one length twice": [b"Content-Length: 0", b"Content-Length: 0"],
    "a list of lengths": [b"Content-Length: 0, 5"],
    "+": [b"Content-Length: +0"],
    "-": [b"Content-Length: -1"],
    "hexadecimal": [b"Content-Length: 0x0"],
    "beyond 64 bits": [b"Content-Length: 18446744073709551616"],
    "no number": [b"Content-Length: "],
    "chunked, identity": [b"Transfer-Encoding: chunked, identity"],
    "identity": [b"Transfer-Encoding: identity"],
    "xchunked": [b"Transfer-Encoding: xchunked"],
    "chunked twice": [b"Transfer-Encoding: chunked, chunked"],
    "two encodings": [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
    "a parameter": [b"Transfer-Encoding: chunked;a=b"],
    "quotes": [b'Transfer-Encoding: "chunked"'],
    "a vertical tab": [b"Transfer-Encoding: \x0bchunked"],
    "a blank before the colon": [b"Transfer-Encoding : chunked"],
    "folded": [b"Transfer-Encoding:\r\n chunked"],
    "another header folded": [b"Content-Length: 0", b"X-A: b\r\n c"],
    "a bare LF": [b"Content-Length: 0", b"X-A: b\nTransfer-Encoding: chunked"],
    "a bare CR": [b"Content-Length: 0", b"X-A: b\rTransfer-Encoding: chunked"],
    "NUL in a value": [b"Content-Length: 0", b"X-A: b\0c"],
    "NUL in a name": [b"Content-Length: 0", b"X-\0A: b"],
    "a blank in a name": [b"Content-Length: 0", b"X A: b"],
    "no colon": [b"Content-Length: 0", b"XA"],
}


@pytest.mark.parametrize("headers", FRAMING.values(), ids=FRAMING)
def test_ambiguous_framing_is_refused_and_its_body_is_no_second_request(site: Website, headers: Sequence[bytes]):
    outer, inner = webhook(), webhook()
    answers = exchange(site, request(outer, *headers, has_length=False, body=b"0\r\n\r\n" + request(inner)), LAST)

    assert statuses(answers) == [400]
    assert not is_stored(site, outer)
    assert not is_stored(site, inner)


CHUNKS = {
    "no number": b"zz\r\n",
    "0x": b"0x0\r\n\r\n",
    "bare LF": b"0\n\n",
    "LF after an extension": b"0;\n\r\n",
    "beyond 64 bits": b"FFFFFFFFFFFFFFFFF\r\n",
    "longer than it says": b"1\r\nabc\r\n0\r\n\r\n",
    "negative": b"-1\r\n",
    "a blank before": b" 0\r\n\r\n",
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_malformed_chunks_are_refused_and_their_rest_is_no_second_request(site: Website, chunks: bytes):
    outer, inner = webhook(), webhook()
    answers = exchange(site, chunked(outer, body=chunks + request(inner)), LAST)

    assert statuses(answers) == [400]
    assert not is_stored(site, outer)
    assert not is_stored(site, inner)


def test_a_head_with_bare_line_feeds_is_refused(site: Website):
    sent = webhook()
    head, _, body = request(sent).partition(b"\r\n\r\n")
    answers = exchange(site, head.replace(b"\r\n", b"\n") + b"\n\n" + body, LAST)

    assert statuses(answers) == [400]
    assert not is_stored(site, sent)


REFUSED_WITH_BODY = {
    "no signature": (b"POST /webhooks/sync", [401, 200]),
    "unknown": (b"POST /nothing", [404, 200]),
    "another method": (b"PUT /webhooks/sync", [405, 200]),
    "no body expected": (b"GET /health/live", [200, 200]),
    "closed": (b"POST /api/pause", [401, 200]),
    "too long": (b"POST /" + b"x" * 5000, [414]),
}


@pytest.mark.parametrize(("line", "expected"), REFUSED_WITH_BODY.values(), ids=REFUSED_WITH_BODY)
@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "later"])
def test_the_body_of_a_request_answered_unread_is_no_second_request(
    site: Website, line: bytes, expected: list[int], *, is_late: bool
):
    inner = webhook()
    body = request(inner)
    head = line + b" HTTP/1.1\r\nHost: mayfly\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connect(site) as connection:
        connection.sendall(head if is_late else head + body)
        time.sleep(0.05)
        with contextlib.suppress(ConnectionError):
            connection.sendall(body + LAST if is_late else LAST)
        answers = read_all(connection)

    assert statuses(answers) == expected
    assert not is_stored(site, inner)


def test_nothing_after_a_request_with_connection_close_is_served(site: Website):
    sent, after = webhook(), webhook()
    answers = exchange(site, request(sent, b"Connection: close") + request(after))

    assert statuses(answers) == [202]
    assert [is_stored(site, one) for one in (sent, after)] == [True, False]


# What is unusual and right


def test_unusual_but_valid_http_is_served(site: Website):
    sent = [webhook() for _ in range(5)]
    chunks = b"%x;name=value\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(sent[0].body), sent[0].body)
    data = [
        chunked(sent[0], body=chunks),
        chunked(sent[1], b"TRANSFER-ENCODING:   Chunked  ", body=as_chunks(sent[1].body, 100)),
        b"\r\n\r\n" + request(sent[2]),
        request(sent[3], b"Expect: 100-continue"),
        request(sent[4]).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ]
    answers = exchange(site, *data)

    assert statuses(answers) == [202, 202, 202, 100, 202, 202]
    assert all(is_stored(site, one) for one in sent)


def test_a_webhook_with_an_upgrade_is_told_so_and_not_that_its_signature_is_wrong(site: Website):
    """The parser gives the body to the other protocol: clients that offer h2c to everyone would look forged."""
    sent, after = webhook(), webhook()
    offer = [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"]
    answers = exchange(site, request(sent, *offer) + request(after))

    assert statuses(answers) == [400]
    assert b"Upgrade" in answers
    assert not is_stored(site, sent)
    assert site.post(sent.body).status_code == 202


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_a_request_without_a_body_is_answered_although_it_offers_an_upgrade(site: Website, protocol: bytes):
    head = b"GET /health/live HTTP/1.1\r\nHost: mayfly\r\nConnection: Upgrade\r\nUpgrade: %b\r\n\r\n" % protocol
    begun = time.monotonic()
    answers = exchange(site, head)

    assert statuses(answers) == [200]
    assert b"connection: close" in answers
    assert time.monotonic() - begun < 5  # what follows on the connection would wait for an answer in vain


# Clients that leave


def test_a_client_that_half_closes_has_one_record_after_it_sends_again(site: Website):
    """The server takes a half-closed connection for a closed one: there is an answer or none, and a 202 is true."""
    for _ in range(20):
        sent, before = webhook(), open_connections(site)
        with connect(site) as connection:
            connection.sendall(request(sent))
            connection.shutdown(socket.SHUT_WR)
            answers = read_all(connection)

        assert statuses(answers) in ([], [202])
        assert is_stored(site, sent) or statuses(answers) == []
        assert site.post(sent.body).status_code == 202
        assert site.count(sent.id) == 1
        wait_for_connections(site, before + 1)


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_leaves_in_its_body_stores_nothing_and_keeps_no_connection(site: Website, *, is_reset: bool):
    records, before = site.count(), open_connections(site)
    for number in range(200):
        sent = webhook()
        data = request(sent)
        connection = connect(site)
        connection.sendall(data[: -1 - number] if number % 2 else data[: len(data) * number // 400])
        if is_reset:
            reset(connection)
        else:
            connection.close()

    wait_for_connections(site, before)
    assert site.count() == records
    assert site.process.exit_code is None


def test_clients_that_reset_before_their_answer_leave_no_connection_and_one_record(site: Website):
    before, sent = open_connections(site), [webhook() for _ in range(100)]
    for one in sent:
        connection = connect(site)
        connection.sendall(request(one) * 3)
        reset(connection)

    wait_for_connections(site, before)
    for one in sent:
        assert site.post(one.body).status_code == 202
        assert site.count(one.id) == 1


def test_the_web_side_is_well_after_all_of_it(site: Website):
    assert site.client.get("/health/live").status_code == 200
    assert site.process.exit_code is None
    assert site.process.events("request.crashed") == []
    levels = {json.loads(line).get("level") for line in site.process.log.read_text().splitlines()}
    assert levels <= {"info", "warning"}
