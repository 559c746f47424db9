"""The fixtures work together: a real application over real resources accepts a signed webhook."""

from tests.support.webhooks import webhook


async def test_a_signed_webhook_is_stored_on_both_databases(app_client):
    sent = webhook()
    answer = await app_client.post("/webhooks/sync", content=sent.body, headers=sent.headers)

    assert answer.status_code == 202
    assert answer.json()["id"] == sent.id


async def test_a_mayfly_process_is_up_and_ends_when_asked_to(mayfly, simulator):
    process = await mayfly("up", SYNC_BASE_URL=simulator.url).start()

    assert await process.terminate() == 0
    assert process.logs("worker.stopped")
