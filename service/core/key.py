"""What names a record."""

import msgspec


class Key(msgspec.Struct, frozen=True, gc=False):
    """What names a record: the account that received the webhook, and the generation's id, an opaque string."""

    account: str
    id: str
