"""The key of a record."""

from typing import Final

import msgspec

# The account of a service without [[account]] in its configuration.
DEFAULT_ACCOUNT: Final = "default"


class Key(msgspec.Struct, frozen=True, gc=False):
    """The key of a record: the account that received the webhook, and the generation's id, an opaque string."""

    account: str
    id: str
