"""What looks like an override of the retention time and is none: words of retention and names one letter off."""

import re
from functools import lru_cache
from typing import Final

_TOKEN: Final = re.compile(r"[^\W_]+")
# What reads as a time to keep something for, or until.
_DURATION: Final = re.compile(
    r"p?t?[+-]?[0-9]+([.,][0-9]+)?[\s_-]*"
    r"(s|m|h|d|w|y|mo|secs?|seconds?|mins?|minutes?|hrs?|hours?|days?|weeks?|months?|yrs?|years?)"
    r"([\s,]*[0-9]+\s*[a-z]+)*",
    re.ASCII,
)
_INSTANT: Final = re.compile(r"[0-9]{4}[-/.][0-9]{1,2}([-/.][0-9]{1,2}.*)?", re.ASCII | re.DOTALL)
_FOREVER: Final = frozenset(
    {"forever", "never", "always", "infinite", "infinity", "permanent", "eternal", "indefinite"}
)
_NUMBER: Final = re.compile(r"[0-9]+([.,][0-9]+)?", re.ASCII)
_UNIX_SECONDS: Final = re.compile(r"[12][0-9]{9}([0-9]{3})?", re.ASCII)
FALSE: Final = frozenset({"0", "false", "no", "off"})

# Names that say how long to keep something, with any value; and beginnings of such names.
_STRONG: Final = {
    **dict.fromkeys(("keep", "keepfor", "keepuntil", "keepforever", "keepit", "retain", "retainfor", "forever"), "ttl"),
    **dict.fromkeys(("deleteafter", "deletein", "autodelete", "timetolive", "nodelete", "donotdelete"), "ttl"),
    **dict.fromkeys(("expiresat", "expiresin", "expireson", "expiresafter", "retainuntil", "deleteat"), "expires"),
    **dict.fromkeys(("hold", "onhold", "legalhold", "holdreason", "holdfor", "litigationhold"), "hold"),
    "holduntil": "hold_until",
}
_BEGINNINGS: Final = {"ttl": "ttl", "retention": "ttl", "keepday": "ttl", "keephour": "ttl", "keepsecond": "ttl"}
# Words in a longer name, such as cookie_expires: only with a value that reads as a time.
_WORDS: Final = {
    **dict.fromkeys(("ttl", "keep", "retain", "retention", "lifetime", "maxage", "delete", "remove", "purge"), "ttl"),
    **dict.fromkeys(("expires", "expire", "expired", "expiry", "expiration"), "expires"),
    **dict.fromkeys(("hold", "held"), "hold"),
}
# Ordinary words that are one letter away from hold.
_NO_HOLD: Final = frozenset(
    (
        *("old", "fold", "gold", "bold", "cold", "sold", "told", "mold", "wold", "held"),
        *("hole", "home", "holy", "hola", "hood", "hod", "holm", "holt", "holo", "hols"),
    )
)
_SIGNATURES: Final = frozenset(
    (
        *("signature", "sig", "sign", "signed", "hmac", "hash", "md5", "sha1", "sha256", "digest", "mac"),
        *("hdnea", "hdnts", "secure", "checksum"),
    )
)
_SIGNERS: Final = frozenset({"keypairid", "googleaccessid", "awsaccesskeyid", "ossaccesskeyid", "accesstoken", "s"})
_TOKENS: Final = frozenset({"token", "auth", "authkey", "st", "key"})


def is_signature(name: str, *, is_ours: bool) -> bool:
    """Whether the parameter *name* shows a signed URL; a token may be an application's own if the URL *is_ours*."""
    tokens = _TOKEN.findall(name)
    joined = "".join(tokens)
    return not _SIGNATURES.isdisjoint(tokens) or joined in _SIGNERS or (not is_ours and joined in _TOKENS)


def suggest_override(name: str, value: str, *, is_signed: bool) -> str | None:
    """Return the override that *name* and *value* seem to mean, None if they are an ordinary parameter.

    *name* is in lower case. *is_signed* says that a signature is beside it, so that a number is the end of a URL.
    """
    tokens = _TOKEN.findall(name)
    joined = "".join(tokens)
    value = value.strip().strip("\"'").lower()
    if not joined or (is_signed and "exp" in joined and _NUMBER.fullmatch(value)):
        return None
    if joined in ("ttl", "expires"):
        return joined
    if value in FALSE:
        return None
    return _named(tokens, joined, value) or _misspelt(joined, value)


def _named(tokens: list[str], joined: str, value: str) -> str | None:
    """Find a word of retention in the name."""
    for beginning, override in _BEGINNINGS.items():
        if joined.startswith(beginning):
            return override
    if joined in _STRONG:
        return _STRONG[joined]
    if joined.endswith("ttl") and (_is_time(value) or _NUMBER.fullmatch(value)):
        return "ttl"
    if not value and tokens[0] in ("expires", "hold"):  # ?hold:legal
        return tokens[0]
    if _is_time(value) and "alive" not in tokens:
        return next((_WORDS[token] for token in tokens if token in _WORDS), None)
    return None


def _misspelt(joined: str, value: str) -> str | None:
    """Find a name that is one letter off, with a value that reads as that override's."""
    if len(joined) > 12:
        return None
    if _is_time(value):
        for word in ("ttl", "expires", "expire", "retention", "retain", "keep"):
            if is_near(joined, word):
                return _WORDS[word]
    if is_near(joined, "expires") and _UNIX_SECONDS.fullmatch(value):
        return "expires"
    if joined == "held" and value:
        return "hold"
    is_reason = value in ("1", "") or not _NUMBER.fullmatch(value)
    return "hold" if is_reason and joined not in _NO_HOLD and is_near(joined, "hold") else None


def _is_time(value: str) -> bool:
    return value in _FOREVER or any(form.fullmatch(value) for form in (_DURATION, _INSTANT))


def is_near(name: str, word: str) -> bool:
    """Whether *name* is *word*, or one letter is missing, added, changed or swapped with its neighbour."""
    return not _shortened_by_one(name).isdisjoint(_shortened_by_one(word))


@lru_cache(1024)
def _shortened_by_one(word: str) -> frozenset[str]:
    """Return *word* and *word* without any one letter; two words that differ by one letter share an element."""
    return frozenset({word, *(word[:index] + word[index + 1 :] for index in range(len(word)))})
