"""`mayfly demo`: all of Mayfly in under a minute, on real parts; only the Sync API is simulated."""

from service.demo.performance import run_demo

__all__ = ["run_demo"]
