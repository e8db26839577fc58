"""kill -9 of the server at any moment leaves the tree as before the call under way, or as after.

The tree that each call should lead to comes from kernel overlayfs: the same script on the same
layers, dumped after every call. The scripts hold one system call a step (no create-then-write),
so that there is nothing between before and after.
"""

from __future__ import annotations

import dataclasses
import os
import random
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support import twin
from tests.support.dump import Dump, diff_dumps
from tests.support.twin import Cast, KernelSide, MicaSide, Op, Side
from unionfs.check import check_upper
from unionfs.client import MountError
from unionfs.faults import POINTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.fuse]

MOST_PASSAGES = int(os.environ.get("MICA_CRASH_PASSAGES", "3"))
"""How many passages of one point are tried, each with a mount of its own."""
SEEDS = range(int(os.environ.get("MICA_CRASH_SEEDS", "6")))
DEAD = frozenset({"ENOTCONN", "ECONNABORTED"})
"""What a call gets from a mount whose server died before or while it answered."""

CREATE = os.O_CREAT | os.O_EXCL
SCRIPT = (
    # copy-ups: metadata only, then the data after it; data at once; linked; parents first
    Op("read", (b"large",)),
    Op("chmod", (b"large", 0o600)),
    Op("write", (b"large", 0, b"head", 0)),
    Op("write", (b"dir/over", os.O_APPEND, b"tail\n", None)),
    Op("chmod", (b"one", 0o604)),
    Op("write", (b"two", 0, b"LINK", 0)),
    Op("truncate", (b"dir/under", 3)),
    Op("chown", (b"dir/sub/leaf", 1000, 100)),
    Op("utimens", (b"pipe", (10**9, 2 * 10**9))),
    Op("chown", (b"pointer", 1001, 1001, False)),
    Op("setxattr", (b"null", "trusted.mica", b"v", 0)),
    # new objects
    Op("open", (b"new", CREATE, 0o640, 0)),
    Op("write", (b"new", 0, b"contents\n", None)),
    Op("setxattr", (b"new", "user.mica", b"v", 0)),
    Op("mkdir", (b"fresh", 0o2770, 0)),
    Op("mknod", (b"fresh/fifo", stat.S_IFIFO | 0o600, 0, 0)),
    Op("symlink", (b"../new", b"fresh/sym")),
    Op("link", (b"new", b"fresh/new")),
    Op("link", (b"dir/over", b"fresh/over")),
    Op("link", (b"two", b"four")),
    # removals: of an upper file, a lower file, one name of several, an emptied merged directory
    Op("unlink", (b"new",)),
    Op("unlink", (b"dir/under",)),
    Op("unlink", (b"dir/three",)),
    Op("rmdir", (b"empty",)),
    Op("mkdir", (b"empty", 0o700, 0)),
    Op("open", (b"empty/file", CREATE, 0o600, 0)),
    Op("unlink", (b"empty/file",)),
    Op("rmdir", (b"empty",)),
    Op("open", (b"dir/under", CREATE, 0o600, 0)),
    Op("unlink", (b"dir/sub/leaf",)),
    Op("rmdir", (b"dir/sub",)),
    Op("mkdir", (b"dir/sub", 0o755, 0)),
    # renames: upper, lower, onto something, a merged directory, an exchange
    Op("rename", (b"fresh/new", b"fresh/newer", 0)),
    Op("rename", (b"large", b"fresh/large", 0)),
    Op("rename", (b"pipe", b"null", 0)),
    Op("rename", (b"dir/sub", b"fresh/sub", 0)),
    Op("rename", (b"dir", b"moved", 0)),
    Op("rename", (b"moved/over", b"fresh/over2", twin.RENAME_NOREPLACE)),
    Op("rename", (b"moved", b"fresh", twin.RENAME_EXCHANGE)),
    Op("rename", (b"one", b"moved/one", 0)),
    Op("rename", (b"moved/sub", b"moved/null", 0)),
    Op("removexattr", (b"moved/newer", "user.mica")),
    Op("chmod", (b"fresh", 0o711)),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Crash:
    """Where a script was when the server died: the index of the call under way."""

    index: int


@pytest.fixture
def cast() -> Iterator[Cast]:
    with Cast() as actors:
        actors.actor(0)
        yield actors


@pytest.fixture
def make(scratch: Path) -> Iterator[Callable[[type[Side], str], Side]]:
    """Builds a side over the example layers; unmounts it whatever happens."""
    scratch.chmod(0o755)
    made: list[Side] = []

    def build(kind: type[Side], name: str) -> Side:
        made.append(kind(scratch / name, twin.EXAMPLE_LAYERS))
        return made[-1]

    yield build
    twin.let_go(*made)


def comparable(dump: Dump) -> Dump:
    """Settled, without directories' times: entering a name and dating it are two steps."""
    return {
        path: dataclasses.replace(entry, mtime_ns=None) if entry.kind == "directory" else entry
        for path, entry in twin.settled(dump).items()
    }


def states(side: Side, cast: Cast, script: Sequence[Op], wanted: Sequence[int]) -> list[Dump]:
    """The trees before the calls with the `wanted` indices (the script's length: after all)."""
    side.mount()
    dumps = []
    for index in range(max(wanted) + 1):
        if index in wanted:
            dumps.append(comparable(cast.dump(side)))
        if index < len(script):
            cast.call(side, script[index])
    side.unmount()
    return dumps


def run_until_death(side: Side, cast: Cast, script: Sequence[Op]) -> Crash | None:
    for index, op in enumerate(script):
        if cast.call(side, op).error in DEAD:
            return Crash(index)
    return None


def recovered(side: MicaSide, cast: Cast) -> Dump:
    """Mount again after a crash, return the tree, and see that nothing is left over."""
    side.env = None
    side.mount()
    dump = comparable(cast.dump(side))
    side.unmount()
    lowers = [bytes(lower) for lower in side.lowers]
    faults = check_upper(bytes(side.upper), lowers, bytes(side.work))
    assert [str(fault) for fault in faults] == []
    assert list((side.work / "work").iterdir()) == []
    return dump


def assert_before_or_after(tree: Dump, before: Dump, after: Dump, op: Op | None) -> None:
    if tree in (before, after):
        return
    lines = ["", f"neither before nor after {op!r}", "before -> found:", *diff_dumps(before, tree)]
    pytest.fail("\n".join([*lines, "after -> found:", *diff_dumps(after, tree)]))


def test_script_succeeds_on_overlayfs(cast: Cast, make: Callable[[type[Side], str], Side]) -> None:
    side = make(KernelSide, "kernel")
    side.mount()
    outcomes = [(op, cast.call(side, op)) for op in SCRIPT]
    side.unmount()
    assert [(op, outcome) for op, outcome in outcomes if outcome.error] == []


@pytest.mark.parametrize("point", POINTS)
def test_death_at_a_fault_point(
    cast: Cast, make: Callable[[type[Side], str], Side], point: str
) -> None:
    trees = states(make(KernelSide, "kernel"), cast, SCRIPT, range(len(SCRIPT) + 1))
    for passage in range(1, MOST_PASSAGES + 1):
        side = make(MicaSide, f"mica{passage}")
        assert isinstance(side, MicaSide)
        side.env = {**os.environ, "MICA_FAULT": f"{point}:kill:{passage}"}
        try:
            side.mount()
        except MountError:
            crash: Crash | None = Crash(0)
        else:
            crash = run_until_death(side, cast, SCRIPT)
        side.kill()
        if crash is None:
            assert passage > 1, f"no call of the script passes {point}"
            return
        index = crash.index
        tree = recovered(side, cast)
        assert_before_or_after(tree, trees[index], trees[index + 1], SCRIPT[index])


# --- at random moments --------------------------------------------------------------------------

DIRECTORIES = (b"dir", b"empty", b"dir/sub", b"d", b"empty/e")
NAMES = (b"one", b"two", b"large", b"over", b"under", b"leaf", b"x", b"y")
LONGEST_WORKLOAD = 600
LONGEST_WAIT_S = 0.4


def workload(rng: random.Random) -> list[Op]:
    """Calls at random places; many fail, which is as good a moment to die as any."""
    return [_random_op(rng) for _ in range(LONGEST_WORKLOAD)]


def _random_op(rng: random.Random) -> Op:
    def place() -> bytes:
        parent = rng.choice((b"", *DIRECTORIES))
        name = rng.choice(NAMES)
        return parent + b"/" + name if parent else name

    def directory() -> bytes:
        return rng.choice(DIRECTORIES)

    makers: tuple[Callable[[], Op], ...] = (
        lambda: Op("open", (place(), CREATE, 0o644, 0o022)),
        lambda: Op("write", (place(), 0, rng.randbytes(100), rng.randrange(5000))),
        lambda: Op("truncate", (place(), rng.randrange(5000))),
        lambda: Op("unlink", (place(),)),
        lambda: Op("mkdir", (directory(), 0o755, 0)),
        lambda: Op("rmdir", (directory(),)),
        lambda: Op("link", (place(), place())),
        lambda: Op("rename", (place(), place(), rng.choice((0, 0, twin.RENAME_EXCHANGE)))),
        lambda: Op("rename", (directory(), directory(), rng.choice((0, twin.RENAME_EXCHANGE)))),
        lambda: Op("chown", (place(), rng.randrange(3), rng.randrange(3), False)),
        lambda: Op("setxattr", (place(), "user.mica", rng.randbytes(5), 0)),
        lambda: Op("chmod", (rng.choice((place(), directory())), rng.choice((0o600, 0o755)))),
    )
    return rng.choice(makers)()


@pytest.mark.parametrize("seed", SEEDS)
def test_death_at_a_random_moment(
    cast: Cast, make: Callable[[type[Side], str], Side], seed: int
) -> None:
    rng = random.Random(seed)
    script = workload(rng)
    side = make(MicaSide, "mica")
    assert isinstance(side, MicaSide)
    side.mount()
    assert side.mounted is not None
    killer = threading.Timer(rng.uniform(0, LONGEST_WAIT_S), os.kill, (side.mounted.pid, 9))
    killer.start()
    crash = run_until_death(side, cast, script)
    killer.join()
    side.kill()
    index = crash.index if crash else len(script)
    tree = recovered(side, cast)
    wanted = (index, min(index + 1, len(script)))
    reference = states(make(KernelSide, "kernel"), cast, script, sorted(set(wanted)))
    op = script[index] if crash else None
    assert_before_or_after(tree, reference[0], reference[-1], op)
