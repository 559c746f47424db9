"""Only a valid signature verifies, and any other header raises a SignatureError."""

import hashlib
import hmac
import random
from datetime import UTC, datetime, timedelta

import pytest

from service.core.signature import MAX_HEADER_LENGTH, MAX_SIGNATURES, SignatureError, sign, verify

SECRET = b"whsec_test_0123456789abcdef0123456789abcdef"
OTHER = b"whsec_test_fedcba9876543210fedcba9876543210"
T = 1761300005
NOW = datetime.fromtimestamp(T, UTC)
TOLERANCE = timedelta(minutes=5)

BODY_A = b'{"id":"3f1c2a9e-7b54-4c1d-9a53-0d2f6f1b8e11","status":"COMPLETED","outputDuration":9.98}'
DIGEST_A = "3f03e4822e0f6af5a93e1f55a498fede4265950698617fc18575fb3da99be3f0"
BODY_B = '{"id":"3f1c2a9e-7b54-4c1d-9a53-0d2f6f1b8e11","status":"FAILED","error":"Größe überschritten"}'.encode()
DIGEST_B = "5760902a12d4188db96a52e65bd290f49085b41cea9aefa6d086141bb1c60842"
STRANGER = "0" * 64


def check(header, body=BODY_A, *, secrets=(SECRET,), now=NOW, tolerance=TOLERANCE):
    return verify(header, body, secrets=secrets, now=now, tolerance=tolerance)


def reason_of(header, **options):
    with pytest.raises(SignatureError) as refusal:
        check(header, **options)
    return refusal.value.reason


@pytest.mark.parametrize(("body", "digest"), [(BODY_A, DIGEST_A), (BODY_B, DIGEST_B)], ids=["ascii", "umlauts"])
def test_the_documented_vectors_verify_and_give_the_send_time(body, digest):
    assert check(f"t={T},v1={digest}", body) == NOW


def test_signing_makes_the_same_digests_as_the_vectors():
    assert sign(BODY_A, secret=SECRET, at=NOW) == f"t={T},v1={DIGEST_A}"
    assert sign(BODY_B, secret=SECRET, at=NOW) == f"t={T},v1={DIGEST_B}"


def test_a_digest_made_without_the_secrets_prefix_is_refused():
    stripped = hmac.new(SECRET.removeprefix(b"whsec_"), b"%d." % T + BODY_A, hashlib.sha256).hexdigest()

    assert stripped.startswith("87b7865b")
    assert reason_of(f"t={T},v1={stripped}") == "mismatch"


def test_the_digest_that_the_documented_flask_sample_computes_is_refused():
    escaped = b'{"id":"3f1c2a9e-7b54-4c1d-9a53-0d2f6f1b8e11","status":"FAILED","error":"Gr\\u00f6\\u00dfe"}'
    digest = hmac.new(SECRET, b"%d." % T + escaped, hashlib.sha256).hexdigest()

    assert reason_of(f"t={T},v1={digest}", body=BODY_B) == "mismatch"


@pytest.mark.parametrize("secrets", [(OTHER, SECRET), (SECRET, OTHER)])
def test_during_a_rotation_either_secret_verifies(secrets):
    assert check(f"t={T},v1={DIGEST_A}", secrets=secrets) == NOW


@pytest.mark.parametrize(
    "digests", [f"v1={STRANGER},v1={DIGEST_A}", f"v1={DIGEST_A},v1={STRANGER}", f"v1=junk,v1={DIGEST_A}"]
)
def test_one_valid_digest_among_several_is_enough(digests):
    assert check(f"t={T},{digests}") == NOW


@pytest.mark.parametrize(
    "header",
    [
        f"v1={DIGEST_A},t={T}",
        f" t={T} , v1={DIGEST_A} ",
        f"t={T},v1={DIGEST_A},v0=old,later",
        f"v2=,t={T},v1={DIGEST_A}",
    ],
)
def test_order_blanks_and_unknown_entries_do_not_matter(header):
    assert check(header) == NOW


@pytest.mark.parametrize("seconds", [300, -300, 0])
def test_a_time_within_the_tolerance_is_accepted_either_way(seconds):
    assert check(f"t={T},v1={DIGEST_A}", now=NOW + timedelta(seconds=seconds)) == NOW


@pytest.mark.parametrize("seconds", [301, -301, 10**8, -(10**8)])
def test_a_time_beyond_the_tolerance_is_refused_either_way(seconds):
    assert reason_of(f"t={T},v1={DIGEST_A}", now=NOW + timedelta(seconds=seconds)) == "stale"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(400, "400 s behind Mayfly's clock (300 s allowed"), (-7200, "7200 s ahead of Mayfly's clock")],
)
def test_a_stale_signature_says_by_how_much_and_which_way(seconds, said):
    with pytest.raises(SignatureError) as refusal:
        check(f"t={T},v1={DIGEST_A}", now=NOW + timedelta(seconds=seconds))

    assert said in refusal.value.details
    assert said in str(refusal.value)


def test_a_forged_signature_is_a_mismatch_whatever_its_time():
    assert reason_of(f"t=1,v1={STRANGER}") == "mismatch"


@pytest.mark.parametrize(
    "digest",
    [DIGEST_A.upper(), DIGEST_A[:-1], DIGEST_A + "0", "", DIGEST_A[:-1] + "O", "0x" + DIGEST_A[2:], f'"{DIGEST_A}"'],
)
def test_a_digest_that_is_not_lower_case_hex_of_its_length_is_refused(digest):
    assert reason_of(f"t={T},v1={digest}") == "mismatch"


def test_a_digest_over_other_bytes_or_another_time_is_refused():
    assert reason_of(f"t={T},v1={DIGEST_A}", body=BODY_A + b" ") == "mismatch"
    assert reason_of(f"t={T + 1},v1={DIGEST_A}") == "mismatch"


def test_an_empty_header_is_missing():
    assert reason_of("") == "missing"


@pytest.mark.parametrize(
    "header",
    [
        "t",
        ",",
        "=",
        "t=,v1=",
        f"t={T}",
        f"v1={DIGEST_A}",
        f"t={T},v0={DIGEST_A}",
        f"t={T},t={T},v1={DIGEST_A}",
        f"T={T},v1={DIGEST_A}",
        f"t=+{T},v1={DIGEST_A}",
        f"t=-{T},v1={DIGEST_A}",
        f"t= {T},v1={DIGEST_A}",
        f"t={T}.0,v1={DIGEST_A}",
        f"t=1_761_300_005,v1={DIGEST_A}",
        f"t=١٧٦١٣٠٠٠٠٥,v1={DIGEST_A}",
        f"t=0x68fb4d25,v1={DIGEST_A}",
        f"t={'9' * 400},v1={DIGEST_A}",
        f"t=nan,v1={DIGEST_A}",
        f"t={T}\0,v1={DIGEST_A}",
        f"t={T};v1={DIGEST_A}",
        f"t={T}," + ",".join([f"v1={DIGEST_A}"] * (MAX_SIGNATURES + 1)),
        f"t={T},v1={DIGEST_A}," + "x" * MAX_HEADER_LENGTH,
    ],
)
def test_a_header_of_another_form_is_malformed(header):
    assert reason_of(header) == "malformed"


@pytest.mark.parametrize("t", ["0", "999999999999", "253402300800"])
def test_an_extreme_time_in_the_header_is_stale(t):
    digest = hmac.new(SECRET, f"{t}.".encode() + BODY_A, hashlib.sha256).hexdigest()

    assert reason_of(f"t={t},v1={digest}") == "stale"


def test_any_invalid_header_raises_a_signature_error():
    chance = random.Random(7)  # noqa: S311 - headers, not secrets
    parts = ["t=", "v1=", ",", "=", str(T), DIGEST_A, "ü", "\0", "\ud800", "9" * 13, " ", "\r\n", "v1", "٣"]
    headers = ["".join(chance.choices(parts, k=chance.randint(1, 12))) for _ in range(2000)]
    refused = [reason_of(header) for header in headers if DIGEST_A not in header]

    assert set(refused) == {"malformed", "mismatch"}


def test_the_refusal_does_not_repeat_what_was_sent():
    with pytest.raises(SignatureError) as refusal:
        check(f"t={T},v1={STRANGER}")

    assert STRANGER not in str(refusal.value)
    assert "whsec" not in str(refusal.value)
