"""A folder of one test's own on a real disk, and the end of whatever the test left in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tests.support import mounts

VARIABLE = "MICA_TEST_DIR"


def find_base() -> Path | None:
    """Return a folder on a file system that can hold an upper, or None.

    Not in memory, where a layer costs RAM and some xattrs are missing; not on a union, where the
    kernel's overlayfs, the oracle of many tests, refuses its upper.
    """
    project = Path(__file__).resolve().parents[2]
    for candidate in (os.environ.get(VARIABLE), "/var/tmp", tempfile.gettempdir(), project.parent):
        if not candidate or not os.access(candidate, os.W_OK | os.X_OK):
            continue
        if mounts.fs_type_of(Path(candidate)) not in mounts.MEMORY_TYPES | mounts.STACKED_TYPES:
            return Path(candidate)
    return None


def make(base: Path) -> Path:
    """Make a folder that every user may pass through, as tests work as several of them."""
    scratch = Path(tempfile.mkdtemp(prefix="mica-test.", dir=base))
    scratch.chmod(0o755)
    return scratch


def remove(scratch: Path) -> list[Path]:
    """End the mounts and the servers below `scratch`, then remove it.

    Returns:
        The mounts that were still there.
    """
    left = mounts.end_mounts_below(scratch)
    mounts.end_processes_that_name(scratch)
    if os.geteuid() != 0:
        _make_removable(scratch)
    shutil.rmtree(scratch)
    return left


def _make_removable(top: Path) -> None:
    """Give a user who is not root access to directories that a test took it from."""
    for directory, names, _ in os.walk(top):
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink():
                path.chmod(0o700)
