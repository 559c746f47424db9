"""Headers of every response, errors included. A route that serves a page overrides them in its declaration."""

from typing import Final

# No route serves a page yet, so nothing may be loaded or framed.
SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
