"""`mayfly send --forward`: what each target would get, posted to apps on real sockets."""

import asyncio
import json
import time
from uuid import UUID, uuid4

import pytest
from standardwebhooks import Webhook

from tests.support.app import Answer, App
from tests.support.commands import command
from tests.support.forwards import FORWARD_SECRET
from tests.support.webhooks import SECRET, signature, webhook


async def mayfly(*arguments: str, **options):
    """Run a command; return its exit code, output and errors."""
    result = await asyncio.to_thread(command, *arguments, **options)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
async def app():
    """An app that takes all webhooks."""
    async with App() as app:
        yield app


@pytest.fixture
def forward(tmp_path):
    """Run `mayfly send --forward` with tables ``[[forward]]``; return its exit code, output and errors."""

    async def run(tables: str, *arguments: str, **options):
        config = tmp_path / "mayfly.toml"
        config.write_text(tables)
        environment = {"SYNC_WEBHOOK_SECRET": SECRET, "CRM_SECRET": FORWARD_SECRET, "MAYFLY_CONFIG": str(config)}
        environment["MAYFLY_DATA_DIR"] = str(tmp_path / "data")
        return await mayfly("send", "--forward", *arguments, **environment | options)

    return run


def table(name: str, url: str, *lines: str) -> str:
    """Return the table of a target."""
    return "\n".join(["[[forward]]", f'id = "{name}"', f'url = "{url}"', *lines, ""])


async def test_a_target_gets_what_is_shown_signed_twice_and_nothing_is_stored(forward, app, tmp_path):
    wanted = str(uuid4())
    url = f"{app.url}/hooks?token=hunter2"
    code, output, errors = await forward(table("crm", url, 'secret_env = "CRM_SECRET"'), "--id", wanted)

    (received,) = app.requests
    assert (code, errors, received.path, received.generation) == (0, "", "/hooks?token=hunter2", wanted)
    sync = received.header("Sync-Signature")
    assert sync == signature(received.body, at=int(sync[2:].partition(",")[0]))
    assert (str(UUID(received.delivery)), received.attempt) == (received.header("webhook-id"), 1)
    at = received.header("webhook-timestamp")
    Webhook(FORWARD_SECRET).verify(received.body, {name.lower(): value for name, value in received.headers})
    assert abs(int(at) - time.time()) < 60
    # All that the app received was shown, but the token.
    assert f"\n  {received.body.decode()}\n" in output
    assert all(f"\n  {name}: {value}\n" in output for name, value in received.headers)
    assert f"POST {app.url}/hooks?…\n" in output
    assert "→ answered 200 (" in output
    assert "not through the service, and nothing is stored" in output
    assert not any(secret in output for secret in ("hunter2", FORWARD_SECRET, SECRET))
    assert not (tmp_path / "data").exists()


async def test_each_try_is_a_delivery_of_its_own(forward, app):
    tables = table("a", app.url) + table("b", app.url)
    await forward(tables)
    await forward(tables)

    assert len({received.delivery for received in app.requests}) == 4


@pytest.mark.parametrize(
    ("answer", "said", "meaning"),
    [
        (Answer(503, body="we sleep"), "answered 503", "send it again after 5s"),
        (Answer(429, headers=(("Retry-After", "120"),)), "answered 429", "after 2m, as its Retry-After asks"),
        (Answer(302, headers=(("Location", "/other"),)), "answered 302, a redirect, which is not followed", "after 5s"),
        (Answer(410), "answered 410: it does not want this webhook", "would not send it again"),
        (Answer(end="never"), "no answer within 1 s", "send it again after 5s"),
        (Answer(end="reset"), "not reached: ReadError", "send it again after 5s"),
    ],
)
async def test_an_answer_that_is_not_2xx_is_explained_and_sets_the_exit_code(forward, app, answer, said, meaning):
    app.default = answer
    code, output, _ = await forward(table("crm", app.url, 'timeout = "1s"', "required = true"))

    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("  → ")]
    assert line.startswith(f"  → {said}")
    assert meaning in line
    assert "would not be deleted before it has answered 2xx" in output
    assert ("\n    | we sleep\n" in output) == bool(answer.body)
    assert len(app.requests) == 1


async def test_no_more_than_the_first_kibibyte_of_an_answer_is_shown(forward, app):
    app.default = Answer(500, body="begin ", filler=100_000)
    _, output, _ = await forward(table("crm", app.url), "--json")

    assert json.loads(output)["targets"][0]["answer"]["body"] == "begin " + "x" * 1018


async def test_what_does_not_match_is_named_and_nothing_is_sent_there(forward, app):
    labels = 'labels = { customer = "acme*", tier = "gold" }'
    tables = table("some", app.url, 'statuses = ["FAILED", "REJECTED"]', labels, 'accounts = "default"')
    url = "http://127.0.0.1:1/webhooks/sync?label.customer=bolt"
    code, output, _ = await forward(tables + table("dead", "http://127.0.0.1:1/", 'statuses = "FAILED"'), "--url", url)

    assert (code, app.requests) == (0, [])
    assert (
        "some does not get it, and nothing is sent\n"
        "  statuses: status is FAILED or REJECTED; this one: COMPLETED\n"
        "  labels: label customer like acme*; this one: bolt\n"
        "  labels: label tier is gold; this one: none\n"
    ) in output
    assert output.endswith("No target gets this webhook: nothing was sent.\n")

    matching = "http://127.0.0.1:1/webhooks/sync?label.customer=acme-eu&label.tier=gold"
    await forward(tables, "--status", "FAILED", "--url", matching)
    assert len(app.requests) == 1


async def test_one_target_that_fails_is_enough_for_the_exit_code(forward, app):
    tables = table("dead", "http://127.0.0.1:1/") + table("app", app.url)
    code, output, _ = await forward(tables, "--json")
    found = {one["target"]: one["answer"] for one in json.loads(output)["targets"]}

    assert (code, json.loads(output)["ok"], len(app.requests)) == (1, False, 1)
    assert (found["dead"]["state"], found["dead"]["status"]) == ("waiting", None)
    assert (found["app"]["state"], found["app"]["status"]) == ("delivered", 200)
    assert found["dead"]["error"] == "not reached: ConnectError: Connection refused"


async def test_a_body_of_ones_own_is_forwarded_byte_for_byte(forward, app):
    body = webhook(error="Größe").body
    await forward(table("crm", app.url), "--file", "-", stdin=body)

    assert app.requests[0].body == body


async def test_the_secret_of_the_account_signs_and_its_name_is_matched(forward, app):
    tables = '[[account]]\nid = "studio"\nwebhook_secret_env = "STUDIO"\n' + table(
        "crm", app.url, 'accounts = "studio"'
    )
    other = "whsec_of_the_studio_0123456789"
    code, _, _ = await forward(tables, "--account", "studio", STUDIO=other)
    (received,) = app.requests
    sync = received.header("Sync-Signature")

    assert code == 0
    assert sync == signature(received.body, secret=other, at=int(sync[2:].partition(",")[0]))


@pytest.mark.parametrize(
    ("tables", "arguments", "code", "problem"),
    [
        ("", (), 2, "mayfly: there is no target to try: MAYFLY_CONFIG has no [[forward]]\n"),
        (table("crm", "http://a/", 'secret_env = "MISSING"'), (), 2, "MISSING, which secret_env names, is not set"),
        (table("crm", "http://a/"), ("--file", "-"), 1, "the service would refuse this body and forward nothing"),
    ],
)
async def test_what_cannot_be_tried_is_said_in_one_line(forward, tables, arguments, code, problem):
    found, output, errors = await forward(tables, *arguments, stdin=b"{}")

    assert (found, output, len(errors.splitlines())) == (code, "", 1)
    assert problem in errors


async def test_send_alone_goes_to_the_service_and_names_the_targets(sqlite_database, open_client, tmp_path, app):
    config = tmp_path / "mayfly.toml"
    config.write_text(table("crm", app.url) + table("bad", app.url, 'statuses = "FAILED"'))
    environment = {"SYNC_WEBHOOK_SECRET": SECRET, "MAYFLY_CONFIG": str(config)}
    async with open_client(sqlite_database) as client:
        url = str(client.base_url.join("/webhooks/sync"))
        code, output, errors = await mayfly("send", "--url", url, **environment)
    refused, _, advice = await mayfly("send", "--json", **environment)

    assert (code, json.loads(output)["state"], app.requests) == (0, "scheduled", [])
    assert errors.endswith("With this MAYFLY_CONFIG the service forwards it to crm: mayfly forwards list\n")
    assert refused == 2
    assert "--json is for --forward" in advice
