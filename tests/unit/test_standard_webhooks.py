"""The second signature of a delivery, checked by the library that apps use."""

import base64
import json
import secrets as random
from datetime import UTC, datetime, timedelta, timezone

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import WebhookVerificationError

from service.core.secret import Secret
from service.core.standard_webhooks import read_signing_key, standard_headers

DELIVERY = "5f0c3e9e-8f5e-4f0a-9d55-0a1b2c3d4e5f"
BODY = '{"id":"g-1",  "status" : "COMPLETED", "title":"Žižek 🎬"}'.encode()


def secret_of(size=32):
    return Secret("whsec_" + base64.b64encode(random.token_bytes(size)).decode())


def signed(body=BODY, *, secrets, at=None):
    return standard_headers(DELIVERY, body, secrets=secrets, at=at or datetime.now(UTC))


def test_the_vector_of_the_specification_is_reproduced():
    # standardwebhooks' own test vector.
    headers = standard_headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
        secrets=[Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")],
        at=datetime.fromtimestamp(1614265330, UTC),
    )

    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.parametrize("size", [24, 32, 64])
def test_the_library_accepts_what_is_signed(size):
    secret = secret_of(size)
    verified = standardwebhooks.Webhook(secret.reveal()).verify(BODY, signed(secrets=[secret]))

    assert verified == json.loads(BODY)


def test_with_several_secrets_the_holder_of_each_accepts_it_and_no_other():
    old, new, foreign = secret_of(), secret_of(), secret_of()
    headers = signed(secrets=[new, old])

    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (old, new):
        standardwebhooks.Webhook(secret.reveal()).verify(BODY, headers)
    with pytest.raises(WebhookVerificationError):
        standardwebhooks.Webhook(foreign.reveal()).verify(BODY, headers)


@pytest.mark.parametrize("changed", [BODY + b" ", BODY.replace(b"  ", b" "), BODY[:-1], b"{}"])
def test_a_changed_body_is_refused(changed):
    secret = secret_of()
    with pytest.raises(WebhookVerificationError):
        standardwebhooks.Webhook(secret.reveal()).verify(changed, signed(secrets=[secret]))


def test_another_delivery_or_another_time_is_refused():
    secret = secret_of()
    headers = signed(secrets=[secret])
    stale = signed(secrets=[secret], at=datetime.now(UTC) - timedelta(minutes=6))
    for wrong in (headers | {"webhook-id": "another"}, headers | {"webhook-timestamp": "1614265330"}, stale):
        with pytest.raises(WebhookVerificationError):
            standardwebhooks.Webhook(secret.reveal()).verify(BODY, wrong)


def test_the_time_zone_of_the_instant_changes_nothing():
    secret, now = secret_of(), datetime.now(UTC).replace(microsecond=999_999)

    assert signed(secrets=[secret], at=now) == signed(
        secrets=[secret], at=now.astimezone(timezone(timedelta(hours=5.5)))
    )


def test_without_a_secret_there_is_no_second_signature():
    assert signed(secrets=[]) == {}


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=60), max_size=5))
def test_the_library_accepts_each_body_whatever_its_text(fields):
    body, secret = json.dumps(fields, ensure_ascii=False).encode(errors="replace"), secret_of()

    standardwebhooks.Webhook(secret.reveal()).verify(body, signed(body, secrets=[secret]))


@pytest.mark.parametrize(
    "text",
    [
        *("", "whsec_", "whsec_s3cr3t", "s3cr3t", "whsec_" + "A" * 30, "whsec_" + "!" * 44, "whsec_" + "ä" * 32),
        *("A" * 44, "WHSEC_" + "A" * 43 + "=", "whsec_" + "A" * 31 + "=", "whsec_ " + "A" * 43 + "="),
        *("whsec_" + base64.b64encode(bytes(23)).decode(), "whsec_" + base64.b64encode(bytes(65)).decode()),
    ],
)
def test_what_is_no_signing_secret_is_refused_and_not_repeated(text):
    with pytest.raises(ValueError, match=r"not base64|not a signing secret") as refusal:
        read_signing_key(Secret(text))

    assert refusal.value.__cause__ is None
    assert not text or text not in str(refusal.value)
