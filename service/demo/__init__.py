"""`mayfly demo`: the whole story in under a minute, on real parts; only the Sync API is a stand-in."""

from service.demo.performance import perform

__all__ = ["perform"]
