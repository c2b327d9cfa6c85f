"""The end of a run: machines that were kept are left to the person until Ctrl-C, all others end."""

from __future__ import annotations

import time

import pytest

from framework.pool import Pool

from .stash import POOL


def pytest_sessionfinish(session: pytest.Session) -> None:
    pool = session.config.stash.get(POOL, None)
    if pool is None:
        return
    try:
        if pool.kept:
            _wait_with(pool, session.config)
    finally:
        pool.close()


def _wait_with(pool: Pool, config: pytest.Config) -> None:
    """Stay with the kept machines until Ctrl-C: they live exactly as long as this process."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for host in pool.kept:
            print(f"\narm-kvm: {host.config.name} is kept as the failed test left it:")
            print(f"  shell:   {host.ssh_command}\n  tables:  arm-kvm stage2 {host.config.name}")
        try:
            print("Ctrl-C ends it.", flush=True)
            while any(host.machine.process.poll() is None for host in pool.kept):
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass
