"""What fails below the union: the caller gets its errno, nothing is torn, and the server lives on.

Disks that are full or read-only are real ones (a tmpfs, and an ext4 on a loop device); what cannot
be had really is injected at the server's fault points.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.dump import Dump, diff_dumps, dump_tree
from tests.support.gatefs import gated
from tests.support.stack import Stack, Stacks
from tests.support.trees import HardLink, Tree, make_tree
from tests.support.users import errno_of, run_as
from unionfs.client import MountError
from unionfs.faults import POINTS
from unionfs.syscalls import RENAME_EXCHANGE, renameat2

MIB = 1 << 20
USER = 1234
LOWER: Tree = {
    "file": "lower text",
    "large": "x" * MIB,
    "deep/er/leaf": "leaf",
    "linked": "two names",
    "also linked": HardLink("linked"),
    "gone": "to be removed",
    "gone dir/": None,
    "merged/one": "1",
    "merged/two": "2",
}
UPPER: Tree = {"own": "upper text", "own dir/": None, "merged/three": "3"}


# --- operations -----------------------------------------------------------------------------------


def append(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, b"appended")
    finally:
        os.close(fd)


def create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def exchange(first: Path, second: Path) -> None:
    renameat2(-100, bytes(first), -100, bytes(second), RENAME_EXCHANGE)


def error_after_all(step: Callable[[], object]) -> int:
    """Repeat until it fails, and return the errno of that."""
    while not (number := errno_of(step)):
        pass
    return number


Operation = Callable[[Path], object]

OPERATIONS: dict[str, Operation] = {
    "create": lambda m: create(m / "new"),
    "create below a lower directory": lambda m: create(m / "deep/er/new"),
    "mkdir": lambda m: (m / "new").mkdir(),
    "mknod": lambda m: os.mkfifo(m / "new"),
    "symlink": lambda m: (m / "new").symlink_to("file"),
    "chmod": lambda m: (m / "file").chmod(0o600),
    "chmod of a directory": lambda m: (m / "deep/er").chmod(0o700),
    "append": lambda m: append(m / "deep/er/leaf"),
    "append to a linked file": lambda m: append(m / "linked"),
    "truncate": lambda m: os.truncate(m / "large", 5),
    "unlink": lambda m: (m / "file").unlink(),
    "unlink of one of two names": lambda m: (m / "linked").unlink(),
    "rmdir": lambda m: (m / "gone dir").rmdir(),
    "rename": lambda m: (m / "file").rename(m / "deep/moved"),
    "rename onto": lambda m: (m / "file").rename(m / "large"),
    "rename of a directory": lambda m: (m / "deep").rename(m / "moved"),
    "exchange": lambda m: exchange(m / "file", m / "deep"),
    "link": lambda m: (m / "new").hardlink_to(m / "file"),
}

NEEDS_NO_OBJECT: dict[str, Operation] = {
    "append to an upper file": lambda m: append(m / "own"),
    "chmod of an upper file": lambda m: (m / "own").chmod(0o600),
    "unlink of an upper file": lambda m: (m / "own").unlink(),
    "rmdir of an upper directory": lambda m: (m / "own dir").rmdir(),
    "rename of an upper file": lambda m: (m / "own").rename(m / "own dir/own"),
    "link of an upper file": lambda m: (m / "new").hardlink_to(m / "own"),
    "attribute": lambda m: os.setxattr(m / "own", "user.a", b"v"),
}


def staged(s: Stack) -> list[str]:
    return os.listdir(s.work / "work")


def assert_same(before: Dump, after: Dump) -> None:
    assert diff_dumps(before, after) == []


def assert_fails_whole(s: Stack, operation: Operation, number: int) -> None:
    """The operation fails with this errno, and neither this mount nor the next one sees a trace."""
    before = dump_tree(s.merged, ino=True)
    assert errno.errorcode.get(errno_of(lambda: operation(s.merged))) == errno.errorcode[number]
    assert_same(before, dump_tree(s.merged, ino=True))
    assert staged(s) == []


def assert_same_after_remount(s: Stack) -> None:
    shown = dump_tree(s.merged, ino=True)
    s.remount()
    assert_same(shown, dump_tree(s.merged, ino=True))


def settled(dump: Dump) -> Dump:
    """What two trees made at different times can be compared by."""
    return {
        path: dataclasses.replace(entry, mtime_ns=None, ino=None) for path, entry in dump.items()
    }


# --- volumes --------------------------------------------------------------------------------------


class Volume:
    """A small file system of its own that can be filled and turned read-only.

    Attributes:
        path: Where it is mounted.
    """

    def __init__(self, path: Path, kind: str, options: str = "") -> None:
        self.path = path
        self.kind = kind
        self.ballast = path / "ballast"
        path.mkdir()
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=200", "none", path]
        else:
            image = path.with_suffix(".img")
            with image.open("xb") as file:
                file.truncate(8 * MIB)
            # Reserved blocks, which root may use, would make "full" a matter of who asks.
            make = ["mkfs.ext4", "-q", "-m0", "-N200", "-Onone,extent,sparse_super,large_file"]
            subprocess.run([*make, image], check=True)
            command = ["mount", "-o", ",".join(["loop", *filter(None, [options])]), image, path]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"needs a {kind} mount with {options!r}: {made.stderr.strip()}")
        self.ballast.mkdir()

    def hold_upper_of(self, s: Stack) -> None:
        """Let the stack write to this volume, and mount it."""
        old, s.upper, s.work = s.upper, self.path / "upper", self.path / "work"
        shutil.copytree(old, s.upper, symlinks=True)
        s.work.mkdir()
        s.start()

    def use_up_inodes(self) -> None:
        numbers = itertools.count()
        make = lambda: (self.ballast / f"i{next(numbers)}").symlink_to("x")  # noqa: E731
        assert error_after_all(make) == errno.ENOSPC

    def use_up_blocks(self) -> None:
        fd = os.open(self.ballast / "blocks", os.O_CREAT | os.O_WRONLY)
        for size in (MIB, 4096, 1024):
            assert error_after_all(lambda: os.write(fd, bytes(size))) == errno.ENOSPC  # noqa: B023
        os.close(fd)
        os.sync()

    def make_room(self) -> None:
        shutil.rmtree(self.ballast)
        self.ballast.mkdir()

    def remount(self, word: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{word}", self.path], check=True)


@pytest.fixture
def volumes(scratch: Path) -> Iterator[Callable[..., Volume]]:
    """Makes volumes, which end after the stacks on them: name this fixture before `stack`."""
    made: list[Volume] = []

    def make(kind: str, options: str = "") -> Volume:
        made.append(Volume(scratch / f"volume{len(made)}", kind, options))
        return made[-1]

    yield make
    for volume in made:
        subprocess.run(["umount", volume.path], check=False)


def stack_on(volume: Volume, stack: Stacks, lower: Tree = LOWER, upper: Tree = UPPER) -> Stack:
    s = stack(lower, upper=upper, mounted=False)
    volume.hold_upper_of(s)
    return s


KINDS = pytest.mark.parametrize("kind", ["tmpfs", "ext4"])

# --- the upper is full ----------------------------------------------------------------------------


@KINDS
def test_no_inode_left_fails_whole_and_works_with_room(
    volumes: Callable[..., Volume], stack: Stacks, kind: str
) -> None:
    volume = volumes(kind)
    s = stack_on(volume, stack)
    for name, operation in OPERATIONS.items():
        volume.use_up_inodes()
        before = dump_tree(s.merged, ino=True)
        assert (name, errno_of(lambda: operation(s.merged))) == (name, errno.ENOSPC)  # noqa: B023
        assert (name, diff_dumps(before, dump_tree(s.merged, ino=True))) == (name, [])
        assert (name, staged(s)) == (name, [])
        volume.make_room()
    assert_same_after_remount(s)


@KINDS
@pytest.mark.parametrize("name", ["append", "rename of a directory", "unlink", "create"])
def test_operation_that_failed_for_want_of_an_inode_succeeds_with_room(
    volumes: Callable[..., Volume], stack: Stacks, kind: str, name: str
) -> None:
    volume = volumes(kind)
    s = stack_on(volume, stack)
    volume.use_up_inodes()
    assert errno_of(lambda: OPERATIONS[name](s.merged)) == errno.ENOSPC
    volume.make_room()
    OPERATIONS[name](s.merged)
    reference = stack(LOWER, upper=UPPER)
    OPERATIONS[name](reference.merged)
    shown = dump_tree(s.merged)
    assert_same(settled(dump_tree(reference.merged)), settled(shown))
    assert_same_after_remount(s)


@KINDS
def test_copy_up_of_data_onto_a_full_upper(
    volumes: Callable[..., Volume], stack: Stacks, kind: str
) -> None:
    volume = volumes(kind)
    s = stack_on(volume, stack)
    volume.use_up_blocks()
    assert_fails_whole(s, lambda m: append(m / "large"), errno.ENOSPC)
    volume.make_room()
    append(s.merged / "large")
    assert (s.merged / "large").read_bytes() == b"x" * MIB + b"appended"


@KINDS
def test_data_of_a_metadata_only_copy_onto_a_full_upper(
    volumes: Callable[..., Volume], stack: Stacks, kind: str
) -> None:
    volume = volumes(kind)
    s = stack_on(volume, stack)
    (s.merged / "large").chmod(0o600)
    volume.use_up_blocks()
    assert_fails_whole(s, lambda m: append(m / "large"), errno.ENOSPC)
    volume.make_room()
    append(s.merged / "large")
    assert (s.merged / "large").read_bytes() == b"x" * MIB + b"appended"


@KINDS
def test_data_of_a_linked_metadata_only_copy_onto_a_full_upper(
    volumes: Callable[..., Volume], stack: Stacks, kind: str
) -> None:
    volume = volumes(kind)
    s = stack_on(volume, stack, {"large": "x" * MIB, "name": HardLink("large")})
    (s.merged / "large").chmod(0o600)
    volume.use_up_blocks()
    assert_fails_whole(s, lambda m: append(m / "name"), errno.ENOSPC)
    assert_same_after_remount(s)
    volume.make_room()
    append(s.merged / "name")
    assert (s.merged / "large").read_bytes() == b"x" * MIB + b"appended"


@KINDS
def test_file_on_a_full_upper_holds_what_the_writes_said(
    volumes: Callable[..., Volume], stack: Stacks, kind: str
) -> None:
    volume = volumes(kind)
    s = stack_on(volume, stack)
    volume.use_up_blocks()
    (volume.ballast / "some room").write_bytes(b"")
    os.truncate(volume.ballast / "blocks", (volume.ballast / "blocks").stat().st_size - MIB)
    os.sync()
    data = os.urandom(2 * MIB)
    fd = os.open(s.merged / "own", os.O_WRONLY | os.O_TRUNC)
    parts: list[int] = []
    write = lambda: parts.append(os.write(fd, data[sum(parts) :]))  # noqa: E731
    assert error_after_all(write) == errno.ENOSPC
    written = sum(parts)
    os.close(fd)
    assert 0 < written < len(data)
    assert (s.merged / "own").read_bytes() == data[:written]
    s.remount()
    assert (s.merged / "own").read_bytes() == data[:written]


def test_quota_of_a_user_is_the_callers(volumes: Callable[..., Volume], stack: Stacks) -> None:
    volume = volumes("ext4", "usrjquota=aquota.user,jqfmt=vfsv1")
    subprocess.run(["quotacheck", "-ucm", volume.path], check=True, capture_output=True)
    turned_on = subprocess.run(
        ["quotaon", volume.path], check=False, capture_output=True, text=True
    )
    if turned_on.returncode != 0:
        pytest.skip(f"needs a kernel with disk quotas: {turned_on.stderr.splitlines()[-1]}")
    limits = ["0", "64", "0", "0"]
    subprocess.run(["setquota", "-u", str(USER), *limits, volume.path], check=True)
    s = stack_on(volume, stack)
    (s.merged / "own dir").chmod(0o777)
    path = s.merged / "own dir/file"
    fill = lambda: path.write_bytes(bytes(MIB))  # noqa: E731 - a child process runs it
    assert errno_of(lambda: run_as(USER, fill)) == errno.EDQUOT
    path.unlink()
    run_as(USER, lambda: path.write_bytes(b"fits"))


# --- the upper turns read-only --------------------------------------------------------------------


@KINDS
def test_upper_turned_read_only_and_back(
    volumes: Callable[..., Volume], stack: Stacks, kind: str
) -> None:
    volume = volumes(kind)
    s = stack_on(volume, stack)
    everything = {**OPERATIONS, **NEEDS_NO_OBJECT}
    before = dump_tree(s.merged, ino=True)
    volume.remount("ro")
    outcomes = {name: errno_of(lambda: do(s.merged)) for name, do in everything.items()}  # noqa: B023
    assert outcomes == dict.fromkeys(everything, errno.EROFS)
    assert_same(before, dump_tree(s.merged, ino=True))
    volume.remount("rw")
    for name in ("append", "append to an upper file", "rename of a directory"):
        everything[name](s.merged)
    assert_same_after_remount(s)


def test_file_open_for_writing_in_a_read_only_upper_can_still_be_read(
    volumes: Callable[..., Volume], stack: Stacks
) -> None:
    volume = volumes("ext4")
    s = stack_on(volume, stack)
    with open(s.merged / "own", "rb") as file:
        volume.remount("ro")
        assert errno_of(lambda: append(s.merged / "own")) == errno.EROFS
        assert file.read() == b"upper text"
    volume.remount("rw")
    append(s.merged / "own")


# --- a lower cannot be read -----------------------------------------------------------------------


def look_around(top: Path) -> None:
    assert sorted(os.listdir(top)) == ["file", "sub"]
    assert (top / "file").read_bytes() == b"text"
    assert (top / "sub/leaf").read_bytes() == b"leaf"
    assert not (top / "absent").exists()


@pytest.mark.parametrize("passage", range(1, 21, 2))
def test_one_failed_look_at_a_lower_costs_one_call(stack: Stacks, passage: int) -> None:
    tree: Tree = {"file": "text", "sub/leaf": "leaf"}
    s = stack([tree, {"sub/other": ""}], mounted=False)
    try:
        s.start(env={"MICA_FAULT": f"read.lower:EIO:{passage}"})
    except MountError:
        s.allow_in_log("")
        return
    failed = 0
    for _ in range(2):
        with_error = errno_of(lambda: look_around(s.merged))
        assert with_error in {0, errno.EIO}
        failed += with_error != 0
    assert failed <= 1
    look_around(s.merged)


def test_data_that_cannot_be_read_is_eio(stack: Stacks, scratch: Path) -> None:
    slow = scratch / "slow"
    slow.mkdir()
    with gated(slow, MIB) as gate:
        gate.fail()
        s = stack({"file": "text"}, mounted=False)
        s.lowers.append(slow)
        s.start()
        assert errno_of((s.merged / "large").read_bytes) == errno.EIO
        assert (s.merged / "file").read_text() == "text"
        s.unmount()


def test_copy_up_of_data_that_cannot_be_read_fails_whole(stack: Stacks, scratch: Path) -> None:
    slow = scratch / "slow"
    slow.mkdir()
    with gated(slow, 4 * MIB) as gate:
        gate.fail()
        s = stack({"file": "text"}, mounted=False)
        s.lowers.append(slow)
        s.start()
        assert errno_of(lambda: append(s.merged / "large")) == errno.EIO
        assert staged(s) == []
        assert os.listdir(s.upper) == []
        assert (s.merged / "large").stat().st_size == 4 * MIB
        s.unmount()


def test_lower_that_is_gone_altogether_is_an_error_for_its_files_only(
    stack: Stacks, scratch: Path
) -> None:
    slow = scratch / "slow"
    slow.mkdir()
    s = stack({"file": "text"}, mounted=False)
    with gated(slow, MIB):
        s.lowers.append(slow)
        s.start()
        assert sorted(os.listdir(s.merged)) == ["file", "large"]
    # its server is dead now, as a network disk's may be
    assert errno_of((s.merged / "large").read_bytes) == errno.ENOTCONN
    assert (s.merged / "file").read_text() == "text"
    create(s.merged / "new")
    s.unmount()
    s.lowers.remove(slow)


# --- a layer is deleted underneath ----------------------------------------------------------------

GONE = {errno.ENOENT, errno.ESTALE, errno.EIO}


@pytest.mark.parametrize("seen", [False, True], ids=["never seen", "seen before"])
def test_lower_deleted_underneath(stack: Stacks, *, seen: bool) -> None:
    s = stack([LOWER, {"kept": "from another layer", "merged/kept": "too"}], upper=UPPER)
    if seen:
        dump_tree(s.merged)
    shutil.rmtree(s.lower)
    for name, operation in OPERATIONS.items():
        number = errno_of(lambda: operation(s.merged))  # noqa: B023
        assert (name, number) in {(name, allowed) for allowed in (0, errno.EEXIST, *GONE)}
        if name in {"append", "exchange"}:
            assert (name, number in GONE) == (name, True)
    assert (s.merged / "kept").read_text() == "from another layer"
    assert (s.merged / "merged/kept").read_text() == "too"
    create(s.merged / "another")
    append(s.merged / "own")
    assert (s.merged / "own").read_text() == "upper textappended"
    s.unmount()
    s.lower.mkdir()
    make_tree(s.lower, LOWER)


def test_directory_of_the_upper_deleted_underneath(stack: Stacks) -> None:
    s = stack(LOWER, upper={"own dir/sub/file": "text", "own": "upper text"})
    dump_tree(s.merged)
    shutil.rmtree(s.upper / "own dir")
    assert errno_of((s.merged / "own dir/sub/file").read_text) in GONE
    assert errno_of(lambda: append(s.merged / "own dir/sub/file")) in GONE
    assert errno_of(lambda: create(s.merged / "own dir/sub/new")) in GONE
    append(s.merged / "file")
    create(s.merged / "new")
    assert (s.merged / "own").read_text() == "upper text"


def test_work_directory_deleted_underneath(stack: Stacks) -> None:
    s = stack(LOWER, upper=UPPER)
    before = dump_tree(s.merged, ino=True)
    shutil.rmtree(s.work)
    assert errno_of(lambda: append(s.merged / "file")) in GONE
    assert_same(before, dump_tree(s.merged, ino=True))
    append(s.merged / "own")
    create(s.merged / "new")
    s.unmount()
    s.work.mkdir()


# --- a failure at every step ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """How to come past a fault point: the calls before, the call that fails, at which passage."""

    point: str
    operation: Operation
    prepare: Operation = lambda _m: None
    passage: int = 1


def make_uppers(m: Path) -> None:
    (m / "gone").unlink()
    (m / "gone dir").rmdir()


STEPS: dict[str, Step] = {
    "data": Step("copyup.data", lambda m: append(m / "file")),
    "data in a thread": Step("copyup.data", lambda m: append(m / "large")),
    "first parent": Step("copyup.staged", lambda m: append(m / "deep/er/leaf"), passage=1),
    "second parent": Step("copyup.staged", lambda m: append(m / "deep/er/leaf"), passage=2),
    "file after parents": Step("copyup.staged", lambda m: append(m / "deep/er/leaf"), passage=3),
    "metadata": Step("copyup.staged", lambda m: (m / "file").chmod(0o600)),
    "metadata, then data": Step(
        "copyup.staged", lambda m: append(m / "file"), lambda m: (m / "file").chmod(0o600), 2
    ),
    "linked": Step("copyup.indexed", lambda m: (m / "linked").chmod(0o600)),
    "linked, data": Step("copyup.indexed", lambda m: append(m / "linked")),
    "linked, unlink": Step("copyup.indexed", lambda m: (m / "linked").unlink()),
    "linked metadata, then data": Step(
        "copyup.data-in-place",
        lambda m: append(m / "also linked"),
        lambda m: (m / "linked").chmod(0o600),
    ),
    "create over a whiteout": Step("create.staged", lambda m: create(m / "gone"), make_uppers),
    "symlink over a whiteout": Step(
        "create.staged", lambda m: (m / "gone").symlink_to("x"), make_uppers
    ),
    "mkdir over a whiteout": Step("mkdir.staged", lambda m: (m / "gone").mkdir(), make_uppers),
    "unlink over a lower": Step(
        "unlink.whiteout-staged",
        lambda m: (m / "file").unlink(),
        lambda m: (m / "file").chmod(0o600),
    ),
    "rmdir over a lower": Step(
        "rmdir.whiteout-staged",
        lambda m: (m / "gone dir").rmdir(),
        lambda m: (m / "gone dir").chmod(0o700),
    ),
    "rename": Step("rename.prepared", lambda m: (m / "file").rename(m / "deep/er/new")),
    "rename onto": Step("rename.prepared", lambda m: (m / "file").rename(m / "large")),
    "rename linked": Step("rename.prepared", lambda m: (m / "linked").rename(m / "new")),
    "rename directory": Step("rename.prepared", lambda m: (m / "deep").rename(m / "new")),
    "rename directory over a whiteout": Step(
        "rename.prepared", lambda m: (m / "own dir").rename(m / "gone dir"), make_uppers
    ),
    "exchange": Step("rename.prepared", lambda m: exchange(m / "file", m / "merged")),
    "link": Step("link.prepared", lambda m: (m / "new").hardlink_to(m / "file")),
    "link over a whiteout": Step(
        "link.prepared", lambda m: (m / "gone").hardlink_to(m / "own"), make_uppers
    ),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_failure_before_publication_leaves_no_trace(stack: Stacks, step: Step) -> None:
    s = stack(LOWER, upper=UPPER, env={"MICA_FAULT": f"{step.point}:EDQUOT:{step.passage}"})
    step.prepare(s.merged)
    assert_fails_whole(s, step.operation, errno.EDQUOT)
    step.operation(s.merged)  # in the same server
    reference = stack(LOWER, upper=UPPER)
    step.prepare(reference.merged)
    step.operation(reference.merged)
    assert_same(settled(dump_tree(reference.merged)), settled(dump_tree(s.merged)))
    assert_same_after_remount(s)


LINKED = [name for name, step in STEPS.items() if step.point == "copyup.indexed"]


@pytest.mark.parametrize("name", [*LINKED, "linked metadata, then data", "rename directory"])
def test_failure_before_publication_leaves_no_trace_for_the_next_mount(
    stack: Stacks, name: str
) -> None:
    step = STEPS[name]
    s = stack(LOWER, upper=UPPER, env={"MICA_FAULT": f"{step.point}:EIO:{step.passage}"})
    step.prepare(s.merged)
    assert_fails_whole(s, step.operation, errno.EIO)
    assert_same_after_remount(s)


def test_every_point_before_a_publication_is_tried() -> None:
    before = {
        point for point in POINTS if point.endswith(("staged", "prepared", "data", "in-place"))
    }
    assert before | {"copyup.indexed"} == {step.point for step in STEPS.values()}
