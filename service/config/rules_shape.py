"""The shape of the file that MAYFLY_CONFIG names: its tables and keys. The JSON schema for editors is made from it."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from service.core.adopting import Adopt

RULE_ID: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
ACCOUNT_ID: Final = r"^[a-z0-9][a-z0-9_-]{0,62}$"
ENVIRONMENT_NAME: Final = r"^[A-Za-z_][A-Za-z0-9_]{0,254}$"
_TTL_FORM: Final = r"^\s*([0-9]{1,9}[smhdw]|forever)\s*$"
_DURATION_FORM: Final = r"^\s*[0-9]{1,9}[smhdw]\s*$"

_Variable = Annotated[str, Meta(pattern=ENVIRONMENT_NAME)]
_Text = Annotated[str, Meta(min_length=1, max_length=255)]
_Texts = _Text | Annotated[list[_Text], Meta(min_length=1, max_length=1000)]
_Duration = Annotated[str, Meta(pattern=_DURATION_FORM, examples=["90s", "15m", "24h", "7d", "2w"])]
_Ttl = Annotated[str, Meta(pattern=_TTL_FORM, examples=["1h", "7d", "forever"])]
_Status = Literal["COMPLETED", "FAILED", "REJECTED", "CANCELED", "TIMED_OUT"]
_AnyStatus = Literal["PENDING", "PROCESSING", "COMPLETED", "FAILED", "REJECTED", "CANCELED", "TIMED_OUT"]


class LengthTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``{ min = "10s", max = "5m" }``: both bounds are included."""

    min: _Duration | None = None
    max: _Duration | None = None


class RuleTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A rule: all of its matchers must match, and one of a list. Exactly one of ttl, expires, forever and hold."""

    id: Annotated[str, Meta(pattern=RULE_ID, description="Its name, which records show.")]
    status: Annotated[
        _Status | Annotated[list[_Status], Meta(min_length=1)] | None, Meta(description="How the generation ended.")
    ] = None
    model: Annotated[_Texts | None, Meta(description="The model; globs.")] = None
    project: Annotated[_Texts | None, Meta(description="The id of the project; globs.")] = None
    source: Annotated[_Texts | None, Meta(description="Where it was made; globs.")] = None
    account: Annotated[_Texts | None, Meta(description="The account whose it is; globs.")] = None
    error_code: Annotated[_Texts | None, Meta(description="The errorCode of sync.so; globs.")] = None
    input_type: Annotated[_Texts | None, Meta(description="The type of an input: video, audio, image, text.")] = None
    output_duration: Annotated[
        str | LengthTable | None, Meta(description='">= 60s", "< 10s" or { min = "10s", max = "5m" }.')
    ] = None
    output_file_name: Annotated[_Texts | None, Meta(description="The name of the output; globs.")] = None
    labels: Annotated[dict[str, _Texts] | None, Meta(description='{ customer = "acme*" }; globs.')] = None
    ttl: Annotated[_Ttl | None, Meta(description="How long it is kept after its webhook was sent.")] = None
    expires: Annotated[str | None, Meta(description="Until when it is kept: an instant or a date.")] = None
    forever: Annotated[bool | None, Meta(description="true: it is never deleted.")] = None
    hold: Annotated[_Text | None, Meta(description="Hold it, for this reason, until an operator releases it.")] = None
    record_ttl: Annotated[
        _Ttl | None, Meta(description="How long the record is kept after its generation is gone.")
    ] = None


class AccountTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """An account: an organisation at sync.so. The key and the secret are in the environment, never in this file."""

    id: Annotated[str, Meta(pattern=ACCOUNT_ID, description="Its name: webhooks come to /webhooks/sync/ID.")]
    api_key_env: Annotated[_Variable | None, Meta(description="The variable that has its API key.")] = None
    webhook_secret_env: Annotated[_Variable | None, Meta(description="The variable that has its secret.")] = None
    min_ttl: Annotated[_Duration | None, Meta(description="No rule and no override keeps for less.")] = None
    max_ttl: Annotated[_Duration | None, Meta(description="No override keeps for longer.")] = None
    rate: Annotated[str | None, Meta(description="Calls to the API: 300/minute. Else MAYFLY_API_RATE.")] = None
    adopt: Annotated[Adopt, Meta(description="What the sweep adopts, by its webhookUrl.")] = "ours"


class ForwardTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A target: an app that gets the webhooks as they came. Its secret is in the environment, never in this file."""

    id: Annotated[str, Meta(pattern=ACCOUNT_ID, description="Its name, which deliveries show.")]
    url: Annotated[str, Meta(max_length=2048, description="Where webhooks are posted: http or https.")]
    statuses: Annotated[
        _AnyStatus | Annotated[list[_AnyStatus], Meta(min_length=1)] | None,
        Meta(description="The status in the webhook. Without it all, those that are not known today, too."),
    ] = None
    accounts: Annotated[_Texts | None, Meta(description="The account that received it; globs.")] = None
    labels: Annotated[dict[str, _Texts] | None, Meta(description='{ customer = "acme*" }; globs.')] = None
    timeout: Annotated[_Duration, Meta(description="How long one attempt takes at most, 1s to 60s.")] = "15s"
    concurrency: Annotated[int, Meta(ge=1, le=100, description="Attempts at once, of each worker.")] = 8
    secret_env: Annotated[_Variable | None, Meta(description="The variable that has its signing secret.")] = None
    required: Annotated[bool, Meta(description="Delete nothing before this target has answered 2xx.")] = False


# What a rule does is said once. A struct cannot say so; read_rules_file() checks it as well.
_OneRule = Annotated[
    RuleTable, Meta(extra_json_schema={"oneOf": [{"required": [end]} for end in ("ttl", "expires", "forever", "hold")]})
]


class ConfigTables(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The file that MAYFLY_CONFIG names."""

    rule: list[_OneRule] = []
    account: list[AccountTable] = []
    forward: list[ForwardTable] = []


def make_schema() -> dict[str, object]:
    """Return the JSON schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(ConfigTables)}
