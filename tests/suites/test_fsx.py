"""fsx and fsstress: random reads, writes, truncates and maps of one file; races over one tree.

Needs the binaries `bin/fsx` and `bin/fsstress` in SUITES_DIR.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.suites.conftest import LOWER_FILE_BYTES, run_to_the_end
from tests.suites.verdicts import complaints

pytestmark = [pytest.mark.suite, pytest.mark.root, pytest.mark.fuse]

OPERATIONS = 100_000
SEEDS = (1, 2, 3, 4)
# The file that fsx works on, and the options it needs for it. fsx empties its file first, except
# with -L, which in turn never changes the size.
FILES = {
    "new": ("new{seed}", ()),
    "reopened": ("reopened{seed}", ("-c", "100")),
    "lower-emptied": ("lower{seed}", ("-c", "100")),
    "lower-kept": ("lower{other}", ("-L", "-c", "100")),
}
FSX_TIMEOUT_S = 1200

STRESS_PROCESSES = 4
STRESS_OPERATIONS = 2000


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", FILES)
def test_fsx(
    kind: str, seed: int, suite_path: Callable[[str], Path], merged: Path, tmp_path: Path
) -> None:
    fsx = suite_path("bin/fsx")
    name, options = FILES[kind]
    path = merged / name.format(seed=seed - 1, other=seed - 1 + len(SEEDS))
    if kind.startswith("lower"):
        assert path.stat().st_size == LOWER_FILE_BYTES
    argv = [str(fsx), "-q", "-N", str(OPERATIONS), "-S", str(seed), "-P", str(tmp_path), *options]
    done = run_to_the_end(
        [*argv, path.name], cwd=merged, timeout_s=FSX_TIMEOUT_S, env={**os.environ}
    )
    case = f"fsx:{kind}:{seed}"
    if done.returncode == 0:
        assert complaints("fsx", passed=[case], failed={}) == []
    else:
        assert complaints("fsx", passed=[], failed={case: done.stdout[-3000:]}) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_fsstress_leaves_a_tree_that_can_be_walked_and_removed(
    seed: int, suite_path: Callable[[str], Path], merged: Path
) -> None:
    fsstress = suite_path("bin/fsstress")
    place = merged / f"stress{seed}"
    place.mkdir()
    # Without -w: reads race with writes. A device 0:0 is a whiteout, which nobody may make.
    argv = [str(fsstress), "-d", str(place), "-n", str(STRESS_OPERATIONS)]
    argv += ["-p", str(STRESS_PROCESSES), "-s", str(seed), "-f", "mknod=0", "-c"]
    done = run_to_the_end(argv, cwd=merged, timeout_s=FSX_TIMEOUT_S, env={**os.environ})
    failed = {} if done.returncode == 0 else {f"fsstress:{seed}": done.stdout[-3000:]}
    listed = {Path(found) / name for found, _, names in os.walk(place) for name in names}
    assert listed
    for path in listed:
        path.lstat()
    removed = run_to_the_end(
        ["rm", "-r", str(place)], cwd=merged, timeout_s=FSX_TIMEOUT_S, env={**os.environ}
    )
    assert removed.returncode == 0, removed.stdout[-3000:]
    passed = [] if failed else [f"fsstress:{seed}"]
    assert complaints("fsx", passed=passed, failed=failed) == []
