"""Benchmarks that were interrupted, or failed, take no figures from the others."""

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """What ended before its first round has no figures, and would keep those of all others from being written."""
    benchmarks = session.config._benchmarksession.benchmarks
    benchmarks[:] = [benchmark for benchmark in benchmarks if benchmark.stats.data]
    return (yield)
