"""Every answer of the Sync API has one meaning; a faulty answer never means that a generation is gone."""

import asyncio
import contextlib
import ssl
from datetime import timedelta
from urllib.parse import quote

import httpx
import pytest

from service.core.attempts import Verdict
from service.core.secret import Secret
from service.simulator import Simulator
from service.simulator.faults import ABSENT_BODIES
from service.sync import answers, client
from service.sync.client import SyncApi, open_sync_api
from tests.conftest import API_KEY

DONE, GONE, RUNNING, RETRY = Verdict.DONE, Verdict.GONE, Verdict.RUNNING, Verdict.RETRY
REFUSED, UNAUTHORIZED = Verdict.REFUSED, Verdict.UNAUTHORIZED
METHODS = ["GET", "DELETE"]

# What each fault means for a GET, and for a DELETE.
TABLE = [
    ("202", RETRY, RETRY),
    ("204", RETRY, DONE),
    ("301", RETRY, RETRY),
    ("302", RETRY, RETRY),
    ("307", RETRY, RETRY),
    ("308", RETRY, RETRY),
    ("400", REFUSED, REFUSED),
    ("401", UNAUTHORIZED, UNAUTHORIZED),
    ("403", UNAUTHORIZED, UNAUTHORIZED),
    ("403-html", UNAUTHORIZED, UNAUTHORIZED),
    ("404", GONE, GONE),
    ("405", REFUSED, REFUSED),
    ("409", RUNNING, RUNNING),
    ("409-conflict", RUNNING, RUNNING),
    ("410", GONE, GONE),
    *((f"{status}:answer={body}", RETRY, RETRY) for status in (404, 410) for body in sorted(ABSENT_BODIES - {"own"})),
    ("404:answer=own", GONE, GONE),
    ("422", REFUSED, REFUSED),
    ("429", RETRY, RETRY),
    ("500", RETRY, RETRY),
    ("502", RETRY, RETRY),
    ("503", RETRY, RETRY),
    ("504", RETRY, RETRY),
    ("drop", RETRY, RETRY),
    ("reset", RETRY, RETRY),
    ("lost", RETRY, RETRY),
    ("truncated", RETRY, RETRY),
    ("huge:megabytes=3", RETRY, RETRY),
    ("html", RETRY, RETRY),
    ("invalid-json", RETRY, RETRY),
    ("non-utf8", RETRY, RETRY),
    ("wrong-id", REFUSED, REFUSED),
    ("processing", RUNNING, DONE),
]


@pytest.fixture
async def api(simulator, metrics):
    async with open_sync_api(simulator.url, Secret(API_KEY), connections=5, metrics=metrics) as api:
        yield api


def call(api, method, generation_id):
    return api.get(generation_id) if method == "GET" else api.delete(generation_id)


class Raw:
    """A server that sends the same bytes to every request."""

    def __init__(self) -> None:
        self.url = ""
        self.answer = b""
        self.requests: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Note the request's head and answer."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            await self.gate.wait()
        writer.write(self.answer)
        await writer.drain()
        writer.close()


@pytest.fixture
async def raw_server():
    """A server whose answers are set byte by byte."""
    raw = Raw()
    async with await asyncio.start_server(raw.serve, "127.0.0.1", 0) as server:
        raw.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield raw


def http(status, body=b"", header="X-Odd: 1"):
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{header}\r\n\r\n"
    return head.encode() + body


async def raw_answer(raw_server, metrics, method, answer, generation_id="g1"):
    raw_server.answer = answer
    async with open_sync_api(raw_server.url, Secret(API_KEY), connections=1, metrics=metrics) as api:
        return await call(api, method, generation_id)


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "REJECTED"])
async def test_a_get_of_a_terminal_generation_shows_it_with_its_body_as_it_came(simulator, api, status):
    generation = simulator.add(status=status, text_input=True)
    answer = await api.get(generation.id)

    assert (answer.verdict, answer.status, answer.error) == (DONE, 200, None)
    assert answer.generation is not None
    assert (answer.generation.id, answer.generation.status) == (generation.id, status)
    assert answer.body is not None
    assert answer.body.encode() == generation.encoded()


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING"])
async def test_an_unfinished_generation_is_still_running_for_get_and_delete(simulator, api, status):
    generation = simulator.add(status=status)
    looked, deleted = await api.get(generation.id), await api.delete(generation.id)

    assert (looked.verdict, deleted.verdict) == (RUNNING, RUNNING)
    assert generation.id in simulator.generations


@pytest.mark.parametrize("status", ["PAUSED", "completed"])
async def test_an_unknown_status_is_retried_and_not_deleted(simulator, api, status):
    assert (await api.get(simulator.add(status=status).id)).verdict is RETRY


async def test_a_delete_returns_the_deleted_generation(simulator, api):
    generation = simulator.add()
    answer = await api.delete(generation.id)

    assert (answer.verdict, answer.status) == (DONE, 200)
    assert answer.body is not None
    assert answer.body.encode() == generation.encoded()
    assert generation.id in simulator.deleted


@pytest.mark.parametrize("method", METHODS)
async def test_a_missing_generation_is_gone(api, method):
    answer = await call(api, method, "11111111-1111-4111-8111-111111111111")

    assert (answer.verdict, answer.status) == (GONE, 404)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("fault", "of_get", "of_delete"), TABLE, ids=[fault for fault, _, _ in TABLE])
async def test_each_answer_means_what_the_table_says(simulator, api, *, fault, of_get, of_delete, method):
    generation = simulator.add(faults={method: [fault]})
    answer = await call(api, method, generation.id)

    assert answer.verdict is (of_get if method == "GET" else of_delete)
    if answer.verdict is not DONE:
        assert answer.error
        assert "token" not in answer.error
        assert "://" not in answer.error


@pytest.mark.parametrize("method", METHODS)
async def test_a_slow_body_is_ended_by_the_timeout_of_the_whole_call(simulator, api, method, monkeypatch):
    monkeypatch.setattr(client, f"{method}_SECONDS", 0.3)
    generation = simulator.add(faults={method: ["slow:interval=0.02"]})
    loop = asyncio.get_running_loop()
    begun = loop.time()
    answer = await call(api, method, generation.id)

    assert answer.verdict is RETRY
    assert answer.error is not None
    assert "did not answer" in answer.error
    assert loop.time() - begun < 2


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_without_an_answer_times_out(simulator, api, method, monkeypatch):
    monkeypatch.setattr(client, f"{method}_SECONDS", 0.3)
    generation = simulator.add(faults={method: ["hold"]})
    answer = await call(api, method, generation.id)
    simulator.release(generation.id)

    assert (answer.verdict, answer.status) == (RETRY, None)


@pytest.mark.parametrize("method", METHODS)
async def test_a_refused_connection_is_retried(metrics, method):
    async with open_sync_api("http://127.0.0.1:9", Secret(API_KEY), connections=1, metrics=metrics) as api:
        answer = await call(api, method, "g1")

    assert (answer.verdict, answer.status) == (RETRY, None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_and_the_key_goes_nowhere_else(raw_server, metrics, method, status):
    elsewhere = Simulator(api_key=API_KEY)
    async with elsewhere.serve():
        answer = await raw_answer(raw_server, metrics, method, http(status, b"", f"Location: {elsewhere.url}/v2/x"))

    assert answer.verdict is RETRY
    assert elsewhere.calls == []
    assert len(raw_server.requests) >= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("location", ["mailto:x", "http:x", "a:b:c", "//", "http://[", "http://xn--ä/", "x" * 70_000])
async def test_a_redirect_with_an_invalid_location_is_retried(raw_server, metrics, method, location):
    answer = await raw_answer(raw_server, metrics, method, http(302, b"", f"Location: {location}"))

    assert answer.verdict is RETRY


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLError(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC]"),
        ConnectionResetError("reset"),
        httpx.ReadError("https://host/?token=x"),
        httpx.InvalidURL("https://host/?token=x"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_network_error_is_retried_and_named_by_its_type(metrics, method, error):
    def break_off(_request):
        raise error

    async with httpx.AsyncClient(base_url="http://api", transport=httpx.MockTransport(break_off)) as client:
        answer = await call(SyncApi(client, metrics, print), method, "g1")

    assert answer.verdict is RETRY
    assert answer.error == f"the {method} did not get through: {type(error).__name__}"


async def test_a_cookie_is_not_sent_back(raw_server, metrics):
    cookies = "Set-Cookie: a=b; Path=/\r\nSet-Cookie: c=d; expires=Wed, 99-Foo-99999999 99:99:99 GMT"
    raw_server.answer = http(404, b"{}", cookies)
    async with open_sync_api(raw_server.url, Secret(API_KEY), connections=1, metrics=metrics) as api:
        await api.get("g1")
        await api.delete("g1")

    assert len(raw_server.requests) == 2
    assert all(b"cookie" not in request.lower() for request in raw_server.requests)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (404, b"<html>404</html>", RETRY),
        (410, b"<html>410</html>", RETRY),
        (404, b"not found", RETRY),
        (404, b"[]", RETRY),
        (404, b"null", RETRY),
        (404, b'"generation_not_found"', RETRY),
        (404, b'["generation_not_found"]', RETRY),
        (404, b'{"errorCode":"generation_not_found"', RETRY),
        (404, b'{"message":"generation_not_found"}', RETRY),
        (404, b'{"error":{"errorCode":"generation_not_found"}}', RETRY),
        (404, b'{"errorCode":["generation_not_found"]}', RETRY),
        (404, b'{"errorCode":"GENERATION_NOT_FOUND"}', RETRY),
        (404, b'{"errorCode":"organization_not_found"}', RETRY),
        (404, b'{"errorCode":"organization_not_found","error_code":"generation_not_found"}', RETRY),
        (404, b'{"error_code":"asset_not_found"}', RETRY),
        pytest.param(404, b"<" * (answers.MAX_BYTES + 1), RETRY, id="404 and a page without end"),
        (404, b"", RETRY),
        (410, b"", RETRY),
        (404, b"{}", RETRY),
        (404, b'{"statusCode":404}', RETRY),
        (404, b'{"errorCode":"generation_not_found"}', GONE),
        (404, b'{"error_code":"generation_not_found"}', GONE),
        (404, b'{"errorCode":null,"error_code":"generation_not_found"}', GONE),
        (410, b'{"errorCode":"generation_not_found"}', GONE),
        (400, b'{"errorCode":"generation_not_found"}', REFUSED),
        (500, b'{"errorCode":"generation_not_found"}', RETRY),
        (402, b"{}", UNAUTHORIZED),
        (408, b"", RETRY),
        (425, b"", RETRY),
        (418, b"", REFUSED),
        (413, b"<html>", REFUSED),
        (451, b"\xff", REFUSED),
        (429, b"<html>", RETRY),
        (499, b"", REFUSED),
        (520, b"<html>", RETRY),
        (599, b"", RETRY),
        (206, b"{}", RETRY),
        (304, b"", RETRY),
        (200, b"", RETRY),
        (200, b"null", RETRY),
        (200, b"[]", RETRY),
        (200, b"{}", RETRY),
        (200, b'{"id":"g1"}', RETRY),
        (200, b'{"id":"G1","status":"COMPLETED"}', REFUSED),
        (200, b'{"id":"g1","status":"COMPLETED","id":"g2"}', RETRY),
        (500, b"[" * 100_000, RETRY),
        (400, b"[" * 100_000, REFUSED),
    ],
)
async def test_a_faulty_answer_never_confirms_a_deletion(raw_server, metrics, *, method, status, body, verdict):
    assert (await raw_answer(raw_server, metrics, method, http(status, body))).verdict is verdict


@pytest.mark.parametrize("method", METHODS)
async def test_a_compressed_answer_is_not_decompressed(raw_server, metrics, method):
    import gzip

    body = gzip.compress(b'{"id":"g1","status":"COMPLETED"}')
    answer = await raw_answer(raw_server, metrics, method, http(200, body, "Content-Encoding: gzip"))

    assert answer.verdict is RETRY
    assert b"identity" in raw_server.requests[0].lower()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bytes_", [b"", b"\r\n", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\x00" * 100])
async def test_an_answer_that_is_not_http_is_retried(raw_server, metrics, method, bytes_):
    assert (await raw_answer(raw_server, metrics, method, bytes_)).verdict is RETRY


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        ("429:retry_after=2", 2),
        ("429:retry_after=0", 0),
        ("503:retry_after=120", 120),
        ("429:body=7", 7),
        ("429:retry_after=315360000", 315360000),
        ("429", None),
        ("429:retry_after=-5", None),
        ("429:retry_after=soon", None),
        ("503:retry_after=Wed", None),
    ],
)
async def test_an_answer_has_the_retry_after_of_the_api(simulator, api, fault, seconds):
    answer = await api.get(simulator.add(faults={"GET": [fault]}).id)

    assert answer.retry_after == (None if seconds is None else timedelta(seconds=seconds))


@pytest.mark.parametrize("seconds", [60, -3600])
async def test_a_date_in_retry_after_is_read_as_the_time_until_then(simulator, api, seconds):
    answer = await api.get(simulator.add(faults={"GET": [f"429:date={seconds}"]}).id)

    assert answer.retry_after is not None
    assert abs(answer.retry_after - timedelta(seconds=seconds)) < timedelta(seconds=5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status", [404, 410])
async def test_an_unknown_route_says_nothing_about_the_generation(raw_server, metrics, method, status):
    body = b'{"message":"Cannot %s /v2/v2/generate/g1","error":"Not Found","statusCode":404}' % method.encode()

    assert (await raw_answer(raw_server, metrics, method, http(status, body))).verdict is RETRY


async def test_a_call_that_times_out_closes_its_connection_and_frees_its_place(raw_server, metrics, monkeypatch):
    monkeypatch.setattr(client, "GET_SECONDS", 0.3)
    monkeypatch.setattr(client, "DELETE_SECONDS", 0.3)
    raw_server.gate.clear()
    async with open_sync_api(raw_server.url, Secret(API_KEY), connections=1, metrics=metrics) as api:
        looking = asyncio.create_task(api.get("g1"))
        await asyncio.sleep(0.1)
        deleting = asyncio.create_task(api.delete("g2"))  # waits for the one connection
        looked, deleted = await asyncio.gather(looking, deleting)
        seen = len(raw_server.requests)
        raw_server.answer = http(404, b'{"errorCode":"generation_not_found"}')
        raw_server.gate.set()
        await asyncio.sleep(0.3)

        assert (looked.verdict, deleted.verdict) == (RETRY, RETRY)
        assert len(raw_server.requests) == seen  # nothing was sent late
        assert (await api.get("g3")).verdict is GONE


async def test_a_429_closes_the_budget(simulator, metrics):
    told: list[float] = []

    async with open_sync_api(
        simulator.url, Secret(API_KEY), connections=1, metrics=metrics, on_throttled=told.append
    ) as api:
        await api.get(simulator.add(faults={"GET": ["429:retry_after=7"]}).id)
        await api.get(simulator.add(faults={"GET": ["503:retry_after=7"]}).id)

    assert told == [7.0]


async def test_after_a_delete_whose_answer_is_lost_the_next_get_is_gone(simulator, api):
    generation = simulator.add(faults={"DELETE": ["lost"]})
    first = await api.delete(generation.id)

    assert first.verdict is RETRY
    assert generation.id in simulator.deleted
    assert (await api.get(generation.id)).verdict is GONE


async def test_a_call_whose_answer_is_lost_is_not_repeated(simulator, api):
    generation = simulator.add(faults={"DELETE": ["drop*"]})
    await api.get(generation.id)
    await api.delete(generation.id)

    assert [call.operation for call in simulator.calls].count("DELETE") == 1


@pytest.mark.parametrize("generation_id", ["a/../b ü?#%2F&x=1", "%2e%2e", "..;", "a\\b", "x" * 255, "+ ", "@", "🪰"])
async def test_any_id_is_one_segment_of_the_path(simulator, api, generation_id):
    generation = simulator.add(generation_id=generation_id)
    looked, deleted = await api.get(generation.id), await api.delete(generation.id)
    paths = [call.raw_path for call in simulator.calls]

    assert (looked.verdict, deleted.verdict) == (DONE, DONE)
    assert paths == [
        f"/v2/generate/{quote(generation_id, safe='')}",
        f"/v2/generations/{quote(generation_id, safe='')}",
    ]
    assert [call.query for call in simulator.calls] == ["", ""]


async def test_the_two_calls_have_different_paths_and_both_carry_the_key(simulator, api):
    generation = simulator.add()
    await api.get(generation.id)
    await api.delete(generation.id)

    assert [(call.method, call.raw_path, call.has_key) for call in simulator.calls] == [
        ("GET", f"/v2/generate/{generation.id}", True),
        ("DELETE", f"/v2/generations/{generation.id}", True),
    ]


async def test_a_base_url_with_a_path_is_kept(raw_server, metrics):
    raw_server.answer = http(404, b"{}")
    url = f"{raw_server.url}/proxy/sync"
    async with open_sync_api(url, Secret(API_KEY), connections=1, metrics=metrics) as api:
        await api.get("g1")

    assert raw_server.requests[0].startswith(b"GET /proxy/sync/v2/generate/g1 HTTP/1.1\r\n")


async def test_no_proxy_of_the_environment_is_used(simulator, metrics, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with open_sync_api(simulator.url, Secret(API_KEY), connections=1, metrics=metrics) as api:
        assert (await api.get(simulator.add().id)).verdict is DONE


async def test_a_wrong_key_is_unauthorized(simulator, metrics):
    async with open_sync_api(simulator.url, Secret("sk-wrong"), connections=1, metrics=metrics) as api:
        answer = await api.get(simulator.add().id)

    assert answer.verdict is UNAUTHORIZED
    assert "sk-wrong" not in str(answer)


async def test_calls_are_counted_by_method_and_class_of_status(simulator, api, metrics):
    await api.get(simulator.add().id)
    await api.delete(simulator.add(faults={"DELETE": ["500"]}).id)
    await api.delete(simulator.add(faults={"DELETE": ["drop"]}).id)
    found = {
        (method, status): metrics.registry.get_sample_value(
            "mayfly_api_calls_total", {"method": method, "status": status}
        )
        for method, status in [("GET", "2xx"), ("DELETE", "5xx"), ("DELETE", "network")]
    }

    assert found == {("GET", "2xx"): 1, ("DELETE", "5xx"): 1, ("DELETE", "network"): 1}
