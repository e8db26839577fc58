"""stress-ng's file-system class: races and verified data, several workers on each stressor."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.suites.conftest import run_to_the_end
from tests.suites.verdicts import complaints

pytestmark = [pytest.mark.suite, pytest.mark.root, pytest.mark.fuse]

_NAMES = """
access chdir chmod chown copy-file dentry dir dirdeep dirmany dnotify dup eventfd fallocate
fanotify fcntl file-ioctl filename flock fpunch fsize fstat getdent handle hdd inode-flags
inotify io iomix ioprio lease link locka lockf lockofd mknod open rename symlink sync-file touch
utime xattr
"""
STRESSORS = _NAMES.split()
# About other file systems than the one they run on, or about a call that FUSE does not hand on.
NOT_RUN = {"bind-mount", "binderfs", "procfs", "sysfs", "ramfs", "chattr", "fiemap", "verity"}
WORKERS = 2
RUN_S = 5
STRESSOR_TIMEOUT_S = 120

# stress-ng(1), EXIT STATUS.
NO_RESOURCE, NOT_IMPLEMENTED = 3, 4


def _stress_ng() -> str:
    program = shutil.which("stress-ng")
    if program is None:
        pytest.skip("stress-ng is not installed")
    return program


def test_no_stressor_is_left_out(suites: Path) -> None:
    argv = [_stress_ng(), "--class", "filesystem?"]
    listing = run_to_the_end(argv, cwd=suites, timeout_s=STRESSOR_TIMEOUT_S, env={**os.environ})
    named = re.search(r"stressors: (.*)", listing.stdout)
    assert named, listing.stdout
    assert set(named[1].split()) - NOT_RUN <= set(STRESSORS)


@pytest.mark.parametrize("stressor", STRESSORS)
def test_stress_ng(stressor: str, merged: Path) -> None:
    place = merged / stressor
    place.mkdir()
    argv = [_stress_ng(), f"--{stressor}", str(WORKERS), "--timeout", str(RUN_S), "--verify"]
    argv += ["--temp-path", str(place), "--metrics-brief"]
    if stressor == "hdd":
        argv += ["--hdd-bytes", "64M"]
    done = run_to_the_end(argv, cwd=place, timeout_s=STRESSOR_TIMEOUT_S, env={**os.environ})
    assert list(place.iterdir()) == [], "the mount is alive and the stressor has cleaned up"
    if done.returncode in {NO_RESOURCE, NOT_IMPLEMENTED}:
        pytest.skip(f"stress-ng says: {done.stdout.strip().splitlines()[-1]}")
    if done.returncode == 0:
        assert complaints("stress-ng", passed=[stressor], failed={}) == []
    else:
        assert complaints("stress-ng", passed=[], failed={stressor: done.stdout[-3000:]}) == []
