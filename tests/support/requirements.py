"""What the machine must offer to a marked test, and what to say where it does not.

On a developer's machine a test whose needs are not met is skipped, with the reason. With CI=true it
fails, because a machine that lacks them would pass without having tested anything.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

FUSE_DEVICE = Path("/dev/fuse")


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"true", "1"}


def missing_root() -> str | None:
    return None if os.geteuid() == 0 else "needs root (real owners, devices, trusted.* xattrs)"


def missing_fuse() -> str | None:
    if not FUSE_DEVICE.exists():
        return f"needs {FUSE_DEVICE} (modprobe fuse; in a container: --device {FUSE_DEVICE})"
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"needs {FUSE_DEVICE}, which this user cannot open: {error.strerror}"
    return None


@functools.cache
def missing_netns() -> str | None:
    made = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, text=True)
    if made.returncode == 0:
        return None
    return f"needs a network namespace of its own: {made.stderr.strip()}"


def missing_suites() -> str | None:
    if os.environ.get("SUITES_DIR"):
        return None
    return "SUITES_DIR is not set: it names the folder that holds outside suites (docs/suites.md)"


NEEDS = {"root": missing_root, "fuse": missing_fuse, "netns": missing_netns}


def require(*needs: str) -> None:
    """Skip the test, or fail it in CI, unless the machine meets all of `needs`."""
    for need in needs:
        reason = NEEDS[need]()
        if reason is not None and in_ci():
            pytest.fail(f"{reason}; with CI=true this is a failure, not a skip", pytrace=False)
        if reason is not None:
            pytest.skip(reason)
