"""Posting to a target, on real sockets: what is sent, and that whatever comes back is a Reply within the timeout."""

import asyncio
import json
import shutil
import ssl
import subprocess
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import standardwebhooks

from service import __version__
from service.core.forwarding import Reply, Target
from service.core.secret import Secret
from service.forwarding.posting import ANSWER_BYTES, Outgoing, make_tls, open_poster
from tests.support.app import Answer, App
from tests.support.ports import free_port
from tests.support.webhooks import webhook

SIGNING = Secret("whsec_" + "A" * 43 + "=")
TLS = make_tls()
LARGE = b'{"id":"g-1","text":"' + b"x" * (2**20 - 22) + b'"}'


@pytest.fixture
async def app():
    async with App() as app:
        yield app


def target_of(app, **changes):
    return replace(Target("crm", Secret(f"{app.url}/hooks?token=s3cr3t"), timeout=timedelta(seconds=5)), **changes)


def outgoing(body=b'{"id":"g-1"}', attempt=1, **fields):
    fields = {"content_type": "application/json", "signature": "t=1,v1=00"} | fields
    return Outgoing("5f0c3e9e-8f5e-4f0a-9d55-0a1b2c3d4e5f", attempt, body, **fields)


@asynccontextmanager
async def posting(app, **changes):
    async with open_poster(target_of(app, **changes), TLS) as poster:
        yield poster


async def post(app, sent=None, **changes):
    async with posting(app, **changes) as poster:
        return await poster.post(sent or outgoing())


@asynccontextmanager
async def answering(raw):
    """Serve *raw* bytes as the answer to whatever comes, and yield the URL of the server."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()


async def post_to(url, **changes):
    target = replace(Target("crm", Secret(url), timeout=timedelta(seconds=2)), **changes)
    async with open_poster(target, TLS) as poster:
        return await poster.post(outgoing())


# What is sent


@pytest.mark.parametrize(
    "body",
    [
        b'{"id" :  "g-1",\r\n\t"status":"COMPLETED"}\n',
        '{"id":"g-1","title":"Žižek 🎬 \\u0000"}'.encode(),
        b"\xef\xbb\xbf{}",
        b"",
        b"\x00\xff\xfe",
        LARGE,
    ],
)
async def test_the_body_arrives_byte_for_byte(app, body):
    reply = await post(app, outgoing(body))

    assert reply == Reply(200)
    assert [one.body for one in app.requests] == [body]


async def test_the_headers_are_those_that_came_and_mayflys_own(app):
    sent = outgoing(attempt=3, content_type="application/json; charset=utf-8", signature="t=5,v1=ab,v1=cd")
    await post(app, sent)
    (request,) = app.requests

    assert (request.method, request.path) == ("POST", "/hooks?token=s3cr3t")
    assert dict(request.headers) == {
        "Host": app.url.removeprefix("http://"),
        "accept": "*/*",
        "accept-encoding": "identity",
        "Connection": "keep-alive",
        "user-agent": f"Mayfly/{__version__}",
        "Content-Type": "application/json; charset=utf-8",
        "Sync-Signature": "t=5,v1=ab,v1=cd",
        "Mayfly-Delivery": sent.id,
        "Mayfly-Attempt": "3",
        "Content-Length": str(len(sent.body)),
    }


async def test_bytes_of_the_headers_are_passed_on_whatever_they_are(app):
    await post(app, outgoing(content_type="application/json; x=\xe9", signature=""))
    (request,) = app.requests

    assert request.header("content-type") == "application/json; x=\xe9"
    assert request.header("sync-signature") is None


async def test_blanks_after_a_header_do_not_keep_a_webhook_from_its_target(app):
    reply = await post(app, outgoing(content_type="application/json \t", signature=" t=5,v1=ab "))
    (request,) = app.requests

    assert reply.is_success
    assert request.header("content-type") == "application/json"
    assert request.header("sync-signature") == "t=5,v1=ab"


async def test_a_target_with_secrets_can_verify_each_attempt_with_each_of_them(app):
    other = Secret("whsec_" + "B" * 43 + "=")
    sent = webhook()
    await post(app, outgoing(sent.body), secrets=(SIGNING, other))
    (request,) = app.requests

    assert request.header("webhook-id") == request.delivery
    for secret in (SIGNING, other):
        verified = standardwebhooks.Webhook(secret.reveal()).verify(request.body, dict(request.headers))
        assert verified == json.loads(sent.body)


async def test_connections_are_kept_and_no_more_than_the_concurrency_are_made(app):
    app.default = Answer(delay=0.05)
    async with posting(app, concurrency=3) as poster:
        replies = await asyncio.gather(*(poster.post(outgoing()) for _ in range(12)))

    assert replies == [Reply(200)] * 12
    assert app.most_at_once == app.connections == 3


async def test_cookies_are_not_kept(app):
    app.default = Answer(headers=(("Set-Cookie", "session=1; Path=/"),))
    async with posting(app) as poster:
        for _ in range(2):
            await poster.post(outgoing())

    assert [one.header("cookie") for one in app.requests] == [None, None]


async def test_no_proxy_of_the_environment_is_used(app, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    assert await post(app) == Reply(200)


# What comes back


@pytest.mark.parametrize("status", [200, 204, 400, 404, 410, 429, 500, 503])
async def test_each_status_is_told_with_the_text_of_the_answer(app, status):
    app.default = Answer(status, body="" if status == 204 else "because")

    assert await post(app) == Reply(status, "" if status == 204 else "because")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(app, status):
    app.default = Answer(status, headers=(("Location", f"{app.url}/elsewhere"),))

    assert (await post(app)).status == status
    assert [one.path for one in app.requests] == ["/hooks?token=s3cr3t"]


@pytest.mark.parametrize(
    "location",
    [
        "http://[",
        "http://x:99999999/",
        "\xff\xfe",
        "http://\xe9.example/",
        "//",
        "",
        "http://" + "a" * 60_000,
        "javascript:0",
        "http://300.1.1.1",
    ],
)
async def test_a_redirect_to_anything_is_a_reply(app, location):
    app.default = Answer(302, headers=(("Location", location),))
    async with posting(app) as poster:
        first = await poster.post(outgoing())
        app.default = Answer()
        second = await poster.post(outgoing())

    assert first == Reply(302)
    assert second == Reply(200)


async def test_retry_after_is_read_in_seconds_and_as_a_date(app):
    at = datetime.now(UTC) + timedelta(minutes=10)
    app.script(Answer(503, headers=(("Retry-After", "7"),)))
    app.script(Answer(429, headers=(("Retry-After", f"{at:%a, %d %b %Y %H:%M:%S} GMT"),)))
    app.script(Answer(503, headers=(("Retry-After", "soon"),)))
    first, second, third = [(await post(app)).retry_after for _ in range(3)]

    assert (first, third) == (timedelta(seconds=7), None)
    assert timedelta(minutes=9) < second < timedelta(minutes=11)


async def test_of_a_large_answer_its_start_is_kept_and_the_rest_not_awaited(app):
    app.default = Answer(500, body="Ž" * 100, filler=2**28)
    started_at = time.monotonic()
    reply = await post(app)

    assert reply == Reply(500, "Ž" * 100 + "x" * (ANSWER_BYTES - 200))
    assert time.monotonic() - started_at < 5
    assert app.requests[0].answered is None


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xff\xfe\x00ok", "\ufffd\ufffd\ufffdok"),
        (b"a\x00b", "a\ufffdb"),
        (b"<script>alert(1)</script>\x1b[31m", "<script>alert(1)</script>\x1b[31m"),
        ("Ž".encode() * 600, "Ž" * 512),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
    ],
)
async def test_whatever_bytes_are_answered_become_text(raw, text):
    head = b"HTTP/1.1 500 Oh\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(raw)
    async with answering(head + raw) as url:
        assert await post_to(url) == Reply(500, text)


async def test_a_2xx_counts_although_its_body_drips(app):
    app.default = Answer(200, body="it drips on and on", drip=0.5)
    started_at = time.monotonic()
    reply = await post(app)

    assert reply.is_success
    assert "it drips on and on".startswith(reply.answer)
    assert time.monotonic() - started_at < 4


async def test_a_2xx_counts_although_its_body_is_cut(app):
    app.default = Answer(200, body="half of it", end="cut")

    assert (await post(app)).is_success


async def test_the_timeout_is_that_of_the_attempt_as_a_whole(app):
    app.default = Answer(drip_head=0.2)  # each byte comes long before a timeout of reads
    started_at = time.monotonic()
    reply = await post(app, timeout=timedelta(seconds=1))

    assert reply == Reply(None, error="no answer within 1 s")
    assert 0.9 < time.monotonic() - started_at < 3


async def test_an_app_that_never_answers_ends_with_the_timeout_and_the_next_one_arrives(app):
    app.script(Answer(end="never"))
    async with posting(app, timeout=timedelta(seconds=1), concurrency=1) as poster:
        assert (await poster.post(outgoing())).error == "no answer within 1 s"
        assert await poster.post(outgoing()) == Reply(200)


async def test_time_spent_waiting_for_a_connection_counts_towards_the_timeout(app):
    app.default = Answer(end="never")
    started_at = time.monotonic()
    async with posting(app, timeout=timedelta(seconds=1), concurrency=1) as poster:
        replies = await asyncio.gather(*(poster.post(outgoing()) for _ in range(3)))
        took = time.monotonic() - started_at
        app.default = Answer()
        assert await asyncio.gather(*(poster.post(outgoing()) for _ in range(3))) == [Reply(200)] * 3

    assert {one.error for one in replies} == {"no answer within 1 s"}
    assert took < 3


async def test_a_connection_that_the_app_has_closed_meanwhile_fails_no_attempt(app):
    async with posting(app) as poster:
        for _ in range(3):
            assert await poster.post(outgoing()) == Reply(200)
            await app.refuse()
            await app.accept()

    assert app.connections == 3


@pytest.mark.parametrize(("end", "error"), [("reset", "ReadError"), ("close", "RemoteProtocolError")])
async def test_a_connection_that_breaks_is_told_without_the_url(app, end, error):
    app.default = Answer(end=end)
    reply = await post(app)

    assert reply.status is None
    assert reply.error.startswith(f"not reached: {error}")
    assert "s3cr3t" not in reply.error
    assert "127.0.0.1" not in reply.error


async def test_a_refused_connection_is_told_by_its_cause():
    reply = await post_to(f"http://127.0.0.1:{free_port()}/?token=s3cr3t")

    assert reply == Reply(None, error="not reached: ConnectError: Connection refused")


async def test_a_host_without_an_address_is_told():
    reply = await post_to("http://host.invalid/")

    assert reply.status is None
    assert reply.error.startswith("not reached: ConnectError")


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"",
            b"\r\n",
            b"SSH-2.0-x\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/9 200\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nx\r\n\r\n",
        ),
        *(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000 + b"\r\n", b"HTTP/1.1 999999 X\r\n\r\n", b"\x00" * 5000),
        *(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n"),
        *(b"HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 101 S\r\nupgrade: x\r\n\r\n"),
        b"HTTP/1.1 500 X\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nabcd",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 500 \xff\xfe\r\nx: \xff\r\nretry-after: \xff\r\ncontent-length: 0\r\n\r\n",
    ],
)
async def test_whatever_is_answered_is_a_reply(raw):
    async with answering(raw) as url:
        reply = await post_to(url)

    assert not reply.is_success
    assert (reply.status is None) == (reply.error is not None)


@pytest.mark.parametrize("host", ["300.1.1.1", "xn--a-.example"])
async def test_a_url_that_is_no_url_is_a_reply(host):
    assert await post_to(f"http://{host}/?token=s3cr3t") == Reply(
        None, error="not reached: its url in MAYFLY_CONFIG is invalid"
    )


async def test_a_certificate_that_is_not_trusted_is_named_by_its_cause(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    options = "req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=DNS:localhost -days 2"
    command = ["openssl", *options.split(), "-keyout", "key.pem", "-out", "cert.pem"]
    await asyncio.to_thread(subprocess.run, command, cwd=tmp_path, check=True, capture_output=True)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    listening = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=server)
    port = listening.sockets[0].getsockname()[1]
    reply = await post_to(f"https://localhost:{port}/?token=s3cr3t")
    listening.close()

    assert reply.error.startswith("not reached: ConnectError: certificate verify failed: self")


async def test_plain_http_where_tls_is_expected_is_told(app):
    reply = await post_to(app.url.replace("http:", "https:"))

    assert reply.error.startswith("not reached: ConnectError")


async def test_a_stop_in_the_middle_of_an_attempt_closes_the_connection(app):
    app.default = Answer(end="never")
    async with posting(app) as poster:
        attempt = asyncio.create_task(poster.post(outgoing()))
        await app.wait_for(1)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        app.default = Answer()
        assert await poster.post(outgoing()) == Reply(200)
