"""What the README promises to a newcomer: the demo shows what each layer holds, and cleans up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import mounts

DEMO = Path(__file__).resolve().parents[1] / "tools" / "demo.sh"
FOLDER = re.compile(r"/var/tmp/mica-demo\.\w+")

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture
def mica_fuse(tmp_path):
    """A mica-fuse that runs the checkout under test."""
    program = tmp_path / "mica-fuse"
    program.write_text(
        f"#!/bin/sh\nPYTHONPATH='{DEMO.parents[1]}' exec '{sys.executable}' -m unionfs \"$@\"\n"
    )
    program.chmod(0o755)
    return program


def run_demo(program, **variables):
    return subprocess.run(
        [DEMO, program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )


def sections(output):
    """Return what the demo printed for each directory, by its name, one text per time shown."""
    shown = {"a": [], "b": [], "union": []}
    current = None
    for line in output.splitlines():
        if line.strip() in shown and line.startswith("  "):
            current = shown[line.strip()]
            current.append("")
        elif not line.startswith("    "):
            current = None
        elif current is not None:
            current[-1] += line.strip() + "\n"
    return shown


def assert_nothing_left(folder):
    assert not Path(folder).exists()
    assert not [mount for mount in mounts.mount_points() if str(mount.path).startswith(folder)]
    assert mounts.pids_that_name(Path(folder)) == []


def test_demo_shows_what_each_layer_holds(mica_fuse):
    told = run_demo(mica_fuse)
    assert told.returncode == 0, told.stdout + told.stderr
    shown = sections(told.stdout)
    before, after = shown["union"]
    assert re.search(r"tea +tea with milk", before)
    assert re.search(r"water +still water", before)
    assert re.search(r"tea +tea with lemon", after)
    assert "coffee" not in after
    assert "manual/" in after
    untouched, b_after = shown["b"]
    assert b_after == untouched
    a_after = shown["a"][-1]
    assert re.search(r"tea +tea with lemon", a_after)
    assert re.search(r"coffee +\(a whiteout", a_after)
    assert "no faults" in told.stdout
    assert_nothing_left(FOLDER.search(told.stdout)[0])


def test_demo_that_fails_leaves_nothing_behind(mica_fuse):
    """The program mounts as it should, and then reports an error of its own."""
    program = mica_fuse.with_name("mica-fuse-failing")
    program.write_text(f'#!/bin/sh\n"{mica_fuse}" "$@"\nexit 3\n')
    program.chmod(0o755)
    told = run_demo(program)
    assert told.returncode == 3
    assert_nothing_left(FOLDER.search(told.stdout)[0])
