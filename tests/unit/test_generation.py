"""A generation is read leniently, except for the fields that decide."""

import json

import pytest

from service.core.generation import MAX_DEPTH, MAX_ID_LENGTH, MalformedError, read_generation
from tests.support.webhooks import batch, notification


def read_fields(**fields):
    return read_generation(json.dumps(notification(**fields)).encode())


def refusal_of(body):
    with pytest.raises(MalformedError) as refusal:
        read_generation(body)
    return str(refusal.value)


def test_id_and_status_are_enough():
    generation = read_generation(b'{"id":"g1","status":"COMPLETED"}')

    assert (generation.id, generation.status) == ("g1", "COMPLETED")
    assert generation.model is generation.output_url is generation.failure_code is generation.webhook_url is None
    assert bytes(generation.input) == b"null"


def test_all_documented_fields_of_a_polled_generation_are_read():
    generation = read_fields(
        outputMediaUrl="https://m",
        segmentOutputUrl="https://s",
        synthesizedAudioUrl="https://a",
        outputFileName="take_07",
        projectId="612bb64a-e7f4-40c1-977b-3e9797845637",
        segments=[{"startTime": 0, "endTime": 1.5}],
    )

    assert generation.output_media_url == "https://m"
    assert generation.segment_output_url == "https://s"
    assert generation.synthesized_audio_url == "https://a"
    assert generation.output_file_name == "take_07"
    assert generation.project_id == "612bb64a-e7f4-40c1-977b-3e9797845637"
    assert generation.output_duration == 9.98
    assert json.loads(bytes(generation.segments)) == [{"startTime": 0, "endTime": 1.5}]


def test_null_fields_are_read_as_none():
    optional = [name for name in notification() if name not in ("id", "status")]
    generation = read_fields(**dict.fromkeys(optional))

    assert generation.output_duration is generation.created_at is generation.model is None


def test_unknown_keys_models_input_types_and_statuses_are_accepted():
    generation = read_fields(
        status="PAUSED", model="sync-99", input=[{"type": "hologram"}], novelty={"deep": [1]}, event=None
    )

    assert generation.status == "PAUSED"
    assert generation.model == "sync-99"
    assert json.loads(bytes(generation.input)) == [{"type": "hologram"}]
    assert not generation.is_terminal


@pytest.mark.parametrize("spelling", ["error_code", "errorCode"])
def test_the_failure_code_is_read_in_both_spellings(spelling):
    body = notification(status="FAILED")
    del body["error_code"]
    generation = read_generation(json.dumps(body | {spelling: "generation_pipeline_failed"}).encode())

    assert generation.failure_code == "generation_pipeline_failed"


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "REJECTED", "CANCELED", "TIMED_OUT"])
def test_a_generation_with_a_final_status_is_terminal(status):
    assert read_fields(status=status).is_terminal


@pytest.mark.parametrize("status", ["PENDING", "PROCESSING", "completed", "COMPLETED "])
def test_any_other_status_is_not_terminal(status):
    assert not read_fields(status=status).is_terminal


def test_only_metrics_make_a_batch():
    assert read_generation(json.dumps(batch()).encode()).is_batch
    assert not read_fields(metrics=None).is_batch
    assert not read_fields(id="batch_abc123").is_batch


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"{",
        b"{}",
        b"{]",
        b'{"id":"g1"}',
        b'{"status":"COMPLETED"}',
        b'{"id":null,"status":"COMPLETED"}',
        b'{"id":1,"status":"COMPLETED"}',
        b'{"id":"g1","status":null}',
        b'{"id":"g1","status":""}',
        b'{"id":"g1","status":5}',
        b'{"id":"g1","status":"COMPLETED"} trailing',
        b'{"id":"g1","status":"COMPLETED","outputDuration":1e999}',
        b"\xff\xfe",
        b'\xef\xbb\xbf{"id":"g1","status":"COMPLETED"}',
        b'{"id":"g1","status":"COMPLETED","input":"\xff"}',
        b'{"id":"g1","status":"COMPLETED","input":[\xff]}',
        '{"id":"g1","status":"COMPLETED"}'.encode("utf-16"),
        b'{"id":"g1","status":"' + b"X" * 65 + b'"}',
        b"<html></html>",
    ],
)
def test_a_body_of_another_shape_is_refused_with_a_sentence(body):
    assert refusal_of(body).startswith("not a generation")


@pytest.mark.parametrize(
    ("field", "value", "name", "read_as"),
    [
        ("error", ["a", "b"], "error", '["a","b"]'),
        ("error", {"message": "x"}, "error", '{"message":"x"}'),
        ("model", 2, "model", "2"),
        ("errorCode", False, "failure_code", "false"),
        ("error_code", 17, "failure_code", "17"),
        ("projectId", 12, "project_id", "12"),
        ("outputUrl", {"url": "https://o"}, "output_url", '{"url":"https://o"}'),
        ("outputDuration", "9.98", "output_duration", None),
        ("outputDuration", [], "output_duration", None),
    ],
)
def test_a_field_that_no_decision_needs_may_have_any_type(field, value, name, read_as):
    body = json.dumps({"id": "g1", "status": "FAILED", field: value}, separators=(",", ":")).encode()

    assert getattr(read_generation(body), name) == read_as


def test_nesting_beyond_the_limit_is_refused():
    def nested(depth):
        return b'{"id":"g1","status":"FAILED","input":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    many = json.dumps({"id": "g1", "status": "FAILED", "error": '[{"' * 500, "input": [{"a": []}] * 500}).encode()

    assert read_generation(nested(MAX_DEPTH)).id == read_generation(many).id == "g1"
    assert refusal_of(nested(MAX_DEPTH + 1)) == "not a generation: nested too deeply"


@pytest.mark.parametrize(
    "generation_id", ["", ".", "..", "a\0b", "a\nb", "a\u202eb", "a\x7fb", "\u2028", "x" * (MAX_ID_LENGTH + 1)]
)
def test_an_id_that_could_not_be_one_segment_of_a_path_is_refused(generation_id):
    assert "id" in refusal_of(json.dumps({"id": generation_id, "status": "COMPLETED"}).encode())


@pytest.mark.parametrize(
    "generation_id", ["x", "batch_1", "a/../b ü?#%2F", "..." * 10, "Ä" * MAX_ID_LENGTH, "-1", "'; drop table"]
)
def test_any_other_id_is_accepted_unchanged(generation_id):
    assert read_fields(id=generation_id).id == generation_id


@pytest.mark.parametrize("value", ["{}", "7", "[]", "true", '{"url":"https://a.example/"}'])
def test_a_webhook_url_of_another_type_becomes_its_json_text(value):
    generation = read_generation(b'{"id":"g1","status":"COMPLETED","webhookUrl":%s}' % value.encode())

    assert generation.webhook_url == value


@pytest.mark.parametrize("key", ["id", "status", "webhookUrl", "metrics"])
def test_a_duplicate_decisive_key_is_refused(key):
    fields = notification(metrics=None)
    body = json.dumps(fields)[:-1] + f', "{key}": {json.dumps(fields[key])}}}'

    assert refusal_of(body.encode()) == f"not a generation: duplicate key {key}"


def test_a_duplicate_decisive_key_with_escapes_is_refused():
    body = b'{"id":"g1","status":"PROCESSING","st\\u0061tus":"COMPLETED"}'

    assert "duplicate key status" in refusal_of(body)


def test_a_decisive_name_in_a_nested_object_or_value_is_no_duplicate():
    generation = read_fields(input=[{"id": "x", "status": "y"}], error="status")

    assert generation.status == "COMPLETED"


def test_any_other_key_may_be_a_duplicate():
    assert read_generation(b'{"id":"g1","status":"FAILED","novelty":1,"novelty":2}').id == "g1"


@pytest.mark.parametrize("field", ["model", "error", "errorCode", "outputUrl", "outputFileName", "createdAt"])
def test_a_nul_character_in_a_text_column_is_refused(field):
    assert "NUL" in refusal_of(json.dumps(notification(**{field: "a\0b"})).encode())


def test_a_nul_character_in_a_raw_part_is_kept_unchanged():
    generation = read_fields(input=[{"script": "a\0b"}])

    assert b"\\u0000" in bytes(generation.input)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'], ids=["arrays", "objects"])
@pytest.mark.parametrize("key", [b"input", b"novelty"])
def test_very_deep_nesting_is_refused_without_a_crash(key, opening):
    body = b'{"id":"g1","status":"COMPLETED","' + key + b'":' + opening * 200_000

    assert refusal_of(body).startswith("not a generation")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\ud83d", "\ufffd"),
        (r"\uDE00 cut", "\ufffd cut"),
        (r"\ude00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (r"\\ud83d \ud83d", "\\ud83d \ufffd"),
        (r"\ud83d\u0041\n", "\ufffdA\n"),
    ],
)
def test_a_lone_surrogate_in_a_text_that_no_decision_needs_is_replaced(written, meant):
    body = rf'{{"id":"g1","status":"COMPLETED","error":"{written}","options":{{"a":"{written}"}},"new":["{written}"]}}'
    generation = read_generation(body.encode())

    assert (generation.id, generation.error) == ("g1", meant)
    assert json.loads(bytes(generation.options)) == {"a": meant}


@pytest.mark.parametrize("name", ["id", "status", "webhookUrl"])
def test_a_lone_surrogate_in_a_decisive_field_is_refused(name):
    fields = {"id": "g1", "status": "COMPLETED", "webhookUrl": "https://a.example/", name: "x"}
    body = json.dumps(fields).replace('"x"', r'"x\ud83d"')

    assert refusal_of(body.encode()).startswith("not a generation: a lone surrogate")


def test_an_unterminated_string_is_refused_at_once():
    assert refusal_of(b"[" * 70 + b'"' + rb"\"" * 400_000).startswith("not a generation")
    assert refusal_of(b'{"id":"g1","status":"COMPLETED","error":"' + rb"\"[" * 300_000).startswith("not a generation")


def test_brackets_inside_strings_do_not_count_as_nesting():
    body = json.dumps({"id": "g1", "status": "COMPLETED", "error": "[" * 900_000 + '"' + "{" * 100})

    assert read_generation(body.encode()).id == "g1"


def test_a_number_of_many_digits_does_not_crash():
    body = b'{"id":"g1","status":"COMPLETED","outputDuration":' + b"9" * 10_000 + b"}"

    assert refusal_of(body).startswith("not a generation")
