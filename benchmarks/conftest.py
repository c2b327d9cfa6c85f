"""Benchmarks that failed or were interrupted do not suppress the figures of the others."""

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Drop benchmarks that ended before their first round: without figures, they would make the report fail."""
    benchmarks = session.config._benchmarksession.benchmarks
    benchmarks[:] = [benchmark for benchmark in benchmarks if benchmark.stats.data]
    return (yield)
