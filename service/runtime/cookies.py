"""A jar that keeps no cookies: what one answer sets goes into no other request."""

from http.cookiejar import CookieJar


class NoCookies(CookieJar):
    """Keeps no cookies."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Do nothing."""
