"""The key of a record."""

import msgspec


class Key(msgspec.Struct, frozen=True, gc=False):
    """The key of a record: the account that received the webhook, and the generation's id, an opaque string."""

    account: str
    id: str
