"""unionmount-testsuite: the semantics of a union, with its own model of every path.

Renames of directories are asked for (no --xdev), and --verify looks at inode numbers over copy-up
and remount, and at the upper itself.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.suites.verdicts import complaints

pytestmark = [pytest.mark.suite, pytest.mark.root, pytest.mark.fuse]

_NAMES = """
open-plain open-trunc open-creat open-creat-trunc open-creat-excl open-creat-excl-trunc
noent-plain noent-trunc noent-creat noent-creat-trunc noent-creat-excl noent-creat-excl-trunc
sym1-plain sym1-trunc sym1-creat sym1-creat-excl sym2-plain sym2-trunc sym2-creat
sym2-creat-excl symx-plain symx-trunc symx-creat symx-creat-excl symx-creat-trunc truncate
dir-open dir-weird-open dir-open-dir dir-sym1-open dir-sym1-weird-open dir-sym2-open
dir-sym2-weird-open readlink mkdir rmdir rmtree rmtree-new hard-link hard-link-dir hard-link-sym
unlink rename-file rename-hard-link rename-new-dir rename-new-pop-dir rename-mass rename-mass-2
rename-mass-3 rename-mass-4 rename-mass-5 rename-mass-dir rename-mass-sym impermissible
rename-dir rename-empty-dir rename-pop-dir rename-move-dir
"""
MODULES = _NAMES.split()
# Neither is in the suite's own list for a union that renames directories.
NOT_RUN = {"rename-exdev", "dir-weird-open-dir"}

WAYS = {
    "verify": ("--ov", "--verify"),
    "slash": ("--ov", "--ts=1", "--verify"),
    "layers": ("--ov=5", "--verify"),
}
MODULE_TIMEOUT_S = 180

# mount(8) looks for a helper in the system's own folders only.
SCRIPT = """
mount --bind "$1" /usr/local/sbin; shift
exec "$@"
"""


def test_no_module_is_left_out(suite_path: Callable[[str], Path]) -> None:
    found = {path.stem for path in suite_path("unionmount-testsuite/tests").glob("*.py")}
    assert found - {"__init__"} == {*MODULES} | NOT_RUN


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("module", MODULES)
def test_unionmount(
    way: str,
    module: str,
    suite_path: Callable[[str], Path],
    mica_as: Callable[[str], Path],
    in_mount_namespace: Callable[..., CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    suite = suite_path("unionmount-testsuite")
    first, *others = WAYS[way]
    done = in_mount_namespace(
        SCRIPT,
        str(mica_as("mica-fuse")),
        *(sys.executable, "run", first, "--fuse=mica-fuse", *others, module),
        cwd=suite,
        timeout_s=MODULE_TIMEOUT_S,
        UNIONMOUNT_BASEDIR=str(tmp_path),
        PYTHONDONTWRITEBYTECODE="1",
    )
    case = f"{way}:{module}"
    if done.returncode == 0:
        assert complaints("unionmount", passed=[case], failed={}) == []
    else:
        assert complaints("unionmount", passed=[], failed={case: done.stdout[-3000:]}) == []
