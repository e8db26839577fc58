"""fuse-overlayfs's own test scripts, with mica-fuse under the name that they call.

A script stops at its first failure; but it is a prelude and numbered cases that each mount anew. So
each case runs on its own, after the prelude, and a failure hides no other.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.suites.verdicts import complaints

pytestmark = [pytest.mark.suite, pytest.mark.root, pytest.mark.fuse]

_NAMES = """
test-copyup test-dir-ops test-hardlinks test-readonly test-rename test-special-files test-stress
test-symlinks test-xattr
"""
NUMBERED = _NAMES.split()
WHOLE = ("test-mmap", "test-passthrough", "unlink", "unpriv")
# Both build an image with a container engine, over a public network.
NOT_RUN = {"alpine", "fedora-installs"}
AS_NOBODY = {"unpriv"}
NEEDED = {
    "test-mmap": ("fuse2fs", "gcc", "ldd"),
    "test-passthrough": ("fuse2fs",),
    "unpriv": ("setpriv", "fusermount", "setcap"),
}

CASE_TIMEOUT_S = 300

_HEADING = re.compile(r"^# =+\n# Test (?P<number>\d+)\b.*\n(?:# .*\n)*?# =+$", re.MULTILINE)

# /dev/fuse may be root's alone: within the namespace everyone may open it.
SCRIPT = """
PATH="$1:$PATH"; shift
if [ "$1" = nobody ]; then
    shift
    mknod -m 666 fuse c 10 229
    mount --bind fuse /dev/fuse
    set -- setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
fi
exec "$@"
"""


def _cases(script: Path) -> Iterator[tuple[str, str]]:
    """Give each numbered case of a script, as the text of a script of its own."""
    text = script.read_text()
    headings = list(_HEADING.finditer(text))
    prelude = text[: headings[0].start()]
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends, strict=True):
        yield heading["number"], prelude + text[heading.start() : end]


def test_no_script_is_left_out(suite_path: Callable[[str], Path]) -> None:
    found = {path.stem for path in suite_path("fuse-overlayfs/tests").glob("*.sh")}
    assert found == {*NUMBERED, *WHOLE} | NOT_RUN


@pytest.mark.parametrize("name", [*NUMBERED, *WHOLE])
def test_fuse_overlayfs_script(
    name: str,
    suite_path: Callable[[str], Path],
    mica_as: Callable[[str], Path],
    in_mount_namespace: Callable[..., CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    script = suite_path(f"fuse-overlayfs/tests/{name}.sh")
    for program in NEEDED.get(name, ()):
        if shutil.which(program) is None:
            pytest.skip(f"{name}.sh needs the program {program}")
    cases = [("all", script.read_text())] if name in WHOLE else list(_cases(script))
    program_folder = str(mica_as("fuse-overlayfs"))
    passed: list[str] = []
    failed: dict[str, str] = {}
    for number, text in cases:
        place = tmp_path / number
        place.mkdir()
        (place / "case.sh").write_text(text)
        command = ["bash", "case.sh"]
        if name in AS_NOBODY:
            shutil.chown(place, 65534, 65534)
            command = ["nobody", *command]
        done = in_mount_namespace(
            SCRIPT, program_folder, *command, cwd=place, timeout_s=CASE_TIMEOUT_S
        )
        case = f"{name}:{number}"
        if done.returncode == 0:
            passed.append(case)
        else:
            failed[case] = f"exit status {done.returncode}\n{done.stdout[-1500:]}"
    print(f"{name}: passed {len(passed)} failed {len(failed)}")
    assert complaints("fuse-overlayfs", passed=passed, failed=failed) == []
