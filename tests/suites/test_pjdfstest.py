"""pjdfstest: the errno, mode, owner, times and link count of every POSIX file call.

Each of its scripts runs in a directory of its own, so that several can run at once: they spend
their time asleep, waiting for a time stamp to move on.
"""

import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.suites.conftest import run_to_the_end
from tests.suites.verdicts import complaints

pytestmark = [pytest.mark.suite, pytest.mark.root, pytest.mark.fuse]

_NAMES = """
chflags chmod chown ftruncate granular link mkdir mkfifo mknod open posix_fallocate rename rmdir
symlink truncate unlink utimensat
"""
FOLDERS = _NAMES.split()
SCRIPTS_AT_ONCE = 4
SCRIPT_TIMEOUT_S = 300

_RESULT = re.compile(r"(?P<failed>not )?ok (?P<number>\d+)(?P<rest>.*)")
_PLAN = re.compile(r"1\.\.(?P<planned>\d+)")


@dataclass
class Tally:
    """What the scripts of one folder said; a TODO is neither passed nor failed."""

    passed: list[str] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def read(self, script: str, output: str) -> None:
        """Add the results of one script, written in the Test Anything Protocol."""
        planned, seen = None, 0
        for line in output.splitlines():
            if plan := _PLAN.match(line):
                planned = int(plan["planned"])
            elif result := _RESULT.match(line):
                seen += 1
                case = f"{script}:{result['number']}"
                if not result["failed"]:
                    self.passed.append(case)
                elif "# TODO" in result["rest"]:
                    self.todo.append(case)
                else:
                    self.failed[case] = result["rest"].strip()
        if planned != seen:
            self.failed[f"{script}:plan"] = f"{planned} planned, {seen} came: {output[-500:]}"


def test_no_folder_is_left_out(suite_path: Callable[[str], Path]) -> None:
    found = suite_path("pjdfstest/tests").iterdir()
    assert {path.name for path in found if path.is_dir()} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_pjdfstest(folder: str, suite_path: Callable[[str], Path], merged: Path) -> None:
    suite_path("pjdfstest/pjdfstest")
    scripts = sorted(suite_path(f"pjdfstest/tests/{folder}").glob("*.t"))
    assert scripts

    def run(script: Path) -> str:
        place = Path(tempfile.mkdtemp(prefix=f"{folder}-{script.stem}-", dir=merged))
        place.chmod(0o755)
        argv = ["sh", str(script)]
        done = run_to_the_end(argv, cwd=place, timeout_s=SCRIPT_TIMEOUT_S, env={**os.environ})
        return done.stdout

    tally = Tally()
    with ThreadPoolExecutor(SCRIPTS_AT_ONCE) as pool:
        for script, output in zip(scripts, pool.map(run, scripts), strict=True):
            tally.read(f"{folder}/{script.name}", output)
    counts = f"passed {len(tally.passed)} failed {len(tally.failed)} todo {len(tally.todo)}"
    print(f"{folder}: {counts}")
    assert complaints("pjdfstest", passed=tally.passed, failed=tally.failed) == []
