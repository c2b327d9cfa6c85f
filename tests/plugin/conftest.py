"""pytest run by tests."""

from ..pytest_run import empty_cache, run

__all__ = ["empty_cache", "run"]
