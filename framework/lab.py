"""Where the lab's own files are, and the switches that hold for a whole run."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
IMAGES = ROOT / "images"


def offline() -> bool:
    """ARM_KVM_OFFLINE=1: caches, local files, loopback and this machine's package registries only."""
    return os.environ.get("ARM_KVM_OFFLINE", "") not in ("", "0")


def cache_root() -> Path:
    """ARM_KVM_CACHE, else the user's cache folder (XDG base directory specification)."""
    if chosen := os.environ.get("ARM_KVM_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arm-kvm"
