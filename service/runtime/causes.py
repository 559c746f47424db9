"""Describing why a connection failed, by its innermost cause and without texts that may hold addresses or secrets."""

import os
import ssl


def describe_cause(error: BaseException) -> str:
    """Return the type of *error*, and what the system or TLS says of its innermost cause."""
    name = type(error).__name__
    found = _innermost(error)
    if isinstance(found, ssl.SSLCertVerificationError):
        return f"{name}: certificate verify failed: {found.verify_message}"
    if isinstance(found, ssl.SSLError):  # its errno is OpenSSL's own, and its reason is not always there
        reason = getattr(found, "reason", None)
        return f"{name}: TLS failed: {reason.lower().replace('_', ' ')}" if reason else name
    if isinstance(found, OSError) and found.errno is not None and found.errno > 0:
        return f"{name}: {os.strerror(found.errno)}"
    return name


def _innermost(error: BaseException) -> BaseException:
    """Follow the chain of causes to its first error that is of the system or TLS, else to its end."""
    seen: list[BaseException] = [error]
    while True:
        last = seen[-1]
        inner = last.__cause__ or last.__context__
        if isinstance(last, BaseExceptionGroup):
            inner = last.exceptions[0]
        if inner is None or inner in seen:
            break
        seen.append(inner)
    return next((one for one in reversed(seen) if isinstance(one, OSError) and one.errno is not None), seen[-1])
