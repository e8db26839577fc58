"""Copy-up: everything about the object comes along, nobody sees it half done, nobody waits for it."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import twin
from tests.support.dump import Entry, diff_dumps, dump_tree
from tests.support.gatefs import BYTE, Gate, gated
from tests.support.stack import Stack, Stacks
from tests.support.trees import HardLink, Node, Symlink, Tree

MIB = 1 << 20
GIB = 1 << 30
ANSWER_TIMEOUT_S = 30.0

# linux/posix_acl_xattr.h: version 2, then (tag, permissions, id)
ACL_ENTRY = struct.Struct("<HHI")
NOBODY_IN_PARTICULAR = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(ACL_ENTRY.pack(*entry) for entry in entries)


ACCESS_ACL = acl(
    (0x01, 6, NOBODY_IN_PARTICULAR),  # user::rw-
    (0x02, 7, 1000),  # user:1000:rwx
    (0x04, 4, NOBODY_IN_PARTICULAR),  # group::r--
    (0x08, 6, 1001),  # group:1001:rw-
    (0x10, 7, NOBODY_IN_PARTICULAR),  # mask::rwx
    (0x20, 0, NOBODY_IN_PARTICULAR),  # other::---
)
# linux/capability.h: VFS_CAP_REVISION_2 with VFS_CAP_FLAGS_EFFECTIVE, cap_net_raw permitted
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)


def open_for_writing(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR))


def entry_of(root: Path, path: str) -> Entry:
    return dump_tree(root, ino=True)[path.encode()]


def without_markers(entry: Entry) -> Entry:
    xattrs = tuple(pair for pair in entry.xattrs or () if "overlay." not in pair[0])
    return replace(entry, xattrs=xattrs)


def read_at(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), count, offset)


# --- what comes along -------------------------------------------------------------------------

FILES: dict[str, Node] = {
    "owner": Node("text", uid=1000, gid=2000),
    "large owner": Node("text", uid=70_000, gid=4_000_000_000),
    "mode": Node("text", mode=0o615),
    "no permission": Node("text", mode=0),
    "set-user-id": Node("text", mode=0o6755, uid=1000),
    "sticky": Node("text", mode=0o1644),
    "nanoseconds": Node("text", mtime_ns=1_234_567_890_123_456_789),
    "before 1970": Node("text", mtime_ns=-86_400_000_000_001),
    "far future": Node("text", mtime_ns=7_000_000_000_000_000_001),
    "user xattr": Node("text", xattrs={"user.a": b"1", "user.\xe9": b"\0\xff"}),
    "empty xattr": Node("text", xattrs={"user.empty": b""}),
    "large xattr": Node("text", xattrs={"user.large": b"v" * 3000}),
    "trusted xattr": Node("text", xattrs={"trusted.mine": b"t"}),
    "security xattr": Node("text", xattrs={"security.mine": b"s"}),
    "access ACL": Node("text", xattrs={"system.posix_acl_access": ACCESS_ACL}),
    "capability": Node("text", mode=0o755, xattrs={"security.capability": CAPABILITY}),
    "empty": Node(""),
    "large": Node("0123456789abcdef" * 100_000),
}


@pytest.fixture
def files(stack: Stacks) -> Stack:
    return stack(FILES)


def test_files_opened_for_writing_are_as_before(files: Stack) -> None:
    before = dump_tree(files.merged, ino=True)
    for name in FILES:
        open_for_writing(files.merged / name)
    assert set(os.listdir(files.upper)) == set(FILES)
    assert diff_dumps(before, dump_tree(files.merged, ino=True)) == []
    files.remount()
    assert diff_dumps(before, dump_tree(files.merged, ino=True)) == []


def test_files_given_an_attribute_are_otherwise_as_before(files: Stack) -> None:
    want = dump_tree(files.merged, ino=True)
    for name in FILES:
        os.setxattr(files.merged / name, "user.zz", b"new")
        entry = want[name.encode()]
        xattrs = tuple(sorted([*(entry.xattrs or ()), ("user.zz", b"new")]))
        want[name.encode()] = replace(entry, xattrs=xattrs)
    assert set(os.listdir(files.upper)) == set(FILES)
    assert diff_dumps(want, dump_tree(files.merged, ino=True)) == []
    files.remount()
    assert diff_dumps(want, dump_tree(files.merged, ino=True)) == []


def test_upper_files_are_what_was_shown(files: Stack) -> None:
    before = dump_tree(files.merged)
    for name in FILES:
        open_for_writing(files.merged / name)
    upper = {name: without_markers(entry) for name, entry in dump_tree(files.upper).items()}
    assert diff_dumps(before, upper) == []


def test_access_time_comes_along(stack: Stacks) -> None:
    s = stack({"f": "text"})
    os.utime(s.lower / "f", ns=(-5_000_000_001, 1_000_000_007))
    open_for_writing(s.merged / "f")
    found = (s.merged / "f").stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (-5_000_000_001, 1_000_000_007)


PARENT = Node(
    mode=0o2750,
    uid=1000,
    gid=1001,
    mtime_ns=123_456_789_012_345_678,
    xattrs={
        "user.a": b"1",
        "system.posix_acl_access": ACCESS_ACL,
        "system.posix_acl_default": ACCESS_ACL,
    },
)


def test_parents_come_along_as_they_were(stack: Stacks) -> None:
    s = stack({"a": PARENT, "a/b": PARENT, "a/b/c": PARENT, "a/b/c/f": "text"})
    before = dump_tree(s.merged, ino=True)
    open_for_writing(s.merged / "a/b/c/f")
    assert (s.upper / "a/b/c/f").exists()
    assert diff_dumps(before, dump_tree(s.merged, ino=True)) == []
    s.remount()
    assert diff_dumps(before, dump_tree(s.merged, ino=True)) == []


def test_file_does_not_inherit_from_the_parent_it_is_copied_into(stack: Stacks) -> None:
    s = stack({"d": PARENT, "d/f": Node("text", mode=0o640), "d/sub": Node(mode=0o700)})
    before = dump_tree(s.merged)
    open_for_writing(s.merged / "d/f")
    os.chmod(s.merged / "d/sub", 0o700)
    assert diff_dumps(before, dump_tree(s.merged)) == []


COPIES_UP: dict[str, Callable[[Path], None]] = {
    "open for writing": open_for_writing,
    "open and truncate": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "append": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_APPEND)),
    "truncate": lambda path: os.truncate(path, 2),
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 1, 1),
    "utime": os.utime,
    "setxattr": lambda path: os.setxattr(path, "user.x", b"1"),
}


def test_copy_up_changes_no_time_of_a_directory(stack: Stacks) -> None:
    old = Node(mtime_ns=1_000_000_000_000_000_001)
    tree: Tree = dict.fromkeys(COPIES_UP, old) | {f"{way}/b": old for way in COPIES_UP}
    files: Tree = {f"{way}/b/f": "text" for way in COPIES_UP}
    s = stack([{**tree, **files}, {f"{way}/other": "text" for way in COPIES_UP}])
    for way, copy_up in COPIES_UP.items():
        copy_up(s.merged / way / "b/f")
        assert (s.upper / way / "b/f").exists()
    for _ in range(2):
        for way in COPIES_UP:
            for directory in (s.merged / way, s.merged / way / "b"):
                assert directory.stat().st_mtime_ns == old.mtime_ns, directory
        s.remount()


def test_copy_up_leaves_the_lower_layer_alone(stack: Stacks) -> None:
    s = stack({f"{way}/{name}": "text" for way in COPIES_UP for name in ("f", "g")})
    before = dump_tree(s.lower, ino=True)
    atimes = {path: path.lstat().st_atime_ns for path in s.lower.rglob("*")}
    for way, copy_up in COPIES_UP.items():
        (s.merged / way / "f").read_text()
        copy_up(s.merged / way / "f")
    assert {path: path.lstat().st_atime_ns for path in s.lower.rglob("*")} == atimes
    assert diff_dumps(before, dump_tree(s.lower, ino=True)) == []


# --- holes ------------------------------------------------------------------------------------


def write_islands(path: Path, size: int, offsets: list[int], data: bytes) -> None:
    with path.open("wb") as file:
        for offset in offsets:
            os.pwrite(file.fileno(), data, offset)
        file.truncate(size)


HOLES: dict[str, tuple[int, list[int]]] = {
    "nothing but a hole": (64 * MIB, []),
    "hole first": (64 * MIB, [64 * MIB - 8192]),
    "hole last": (64 * MIB, [0]),
    "islands": (256 * MIB, [0, MIB, 100 * MIB, 200 * MIB + 4096]),
    "ends inside a block": (8 * MIB + 5, [4096, 8 * MIB - 8000]),
}


@pytest.mark.parametrize("case", HOLES)
@pytest.mark.parametrize("metacopy_first", [False, True], ids=["at-once", "by-way-of-metacopy"])
def test_holes_stay_holes(stack: Stacks, case: str, metacopy_first: bool) -> None:
    size, offsets = HOLES[case]
    s = stack(mounted=False)
    write_islands(s.lower / "f", size, offsets, b"island" * 100)
    s.start()
    if metacopy_first:
        (s.merged / "f").chmod(0o600)
    open_for_writing(s.merged / "f")
    upper, lower = (s.upper / "f").stat(), (s.lower / "f").stat()
    assert upper.st_size == lower.st_size
    assert upper.st_blocks <= lower.st_blocks + 8
    for offset in offsets:
        assert read_at(s.merged / "f", offset, 600) == read_at(s.lower / "f", offset, 600)


def test_contents_around_holes_are_the_same(stack: Stacks) -> None:
    s = stack(mounted=False)
    write_islands(s.lower / "f", 8 * MIB + 5, [4000, 3 * MIB - 1, 8 * MIB - 3], b"abc")
    s.start()
    open_for_writing(s.merged / "f")
    want = hashlib.sha256((s.lower / "f").read_bytes()).hexdigest()
    assert hashlib.sha256((s.merged / "f").read_bytes()).hexdigest() == want
    assert hashlib.sha256((s.upper / "f").read_bytes()).hexdigest() == want


def test_data_beyond_two_gigabytes_is_copied(stack: Stacks) -> None:
    offsets = [0, GIB, 2 * GIB + 4096, 5 * GIB]
    s = stack(mounted=False)
    write_islands(s.lower / "f", 6 * GIB, offsets, b"far")
    s.start()
    with (s.merged / "f").open("r+b") as file:
        os.pwrite(file.fileno(), b"NEW", 4 * GIB)
    s.remount()
    assert (s.merged / "f").stat().st_size == 6 * GIB
    assert [read_at(s.merged / "f", offset, 3) for offset in offsets] == [b"far"] * 4
    assert read_at(s.merged / "f", 4 * GIB, 3) == b"NEW"
    assert (s.upper / "f").stat().st_blocks < 200


# --- hard links -------------------------------------------------------------------------------

LINKED: Tree = {"a": "text", "b": HardLink("a"), "d/c": HardLink("a"), "other": "x"}
NAMES = ("a", "b", "d/c")


def test_hard_links_stay_one_file(stack: Stacks) -> None:
    s = stack(
        {f"{way}/a": "text" for way in COPIES_UP}
        | {f"{way}/b": HardLink(f"{way}/a") for way in COPIES_UP}
        | {f"{way}/d/c": HardLink(f"{way}/a") for way in COPIES_UP}
    )
    before = {way: (s.merged / way / "a").stat().st_ino for way in COPIES_UP}
    for way, copy_up in COPIES_UP.items():
        copy_up(s.merged / way / "b")
    for _ in range(2):
        for way in COPIES_UP:
            found = [(s.merged / way / name).stat() for name in NAMES]
            assert {(way, st.st_ino, st.st_nlink) for st in found} == {(way, before[way], 3)}
            assert len({(st.st_size, st.st_mode, st.st_uid, st.st_mtime_ns) for st in found}) == 1
        s.remount()


@pytest.mark.parametrize("written", NAMES)
def test_write_through_one_hard_link_shows_under_all(stack: Stacks, written: str) -> None:
    s = stack(LINKED)
    for name in NAMES:
        (s.merged / name).read_text()
    with (s.merged / written).open("a") as file:
        file.write(" more")
    assert {(s.merged / name).read_text() for name in NAMES} == {"text more"}
    s.remount()
    assert {(s.merged / name).read_text() for name in NAMES} == {"text more"}


def test_copied_up_hard_links_are_links_in_the_upper(stack: Stacks) -> None:
    s = stack(LINKED)
    for name in NAMES:
        open_for_writing(s.merged / name)
        os.rename(s.merged / name, s.merged / (name + "-moved"))
    assert len({(s.upper / (name + "-moved")).stat().st_ino for name in NAMES}) == 1


# --- what is not a file -----------------------------------------------------------------------

NO_DRIVER = os.makedev(4000, 77)  # to open it gives ENXIO
SPECIAL: dict[str, Node] = {
    "character device": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3), mode=0o640, uid=5),
    "device without driver": Node(kind=stat.S_IFCHR, rdev=NO_DRIVER, mode=0o600),
    "block device": Node(kind=stat.S_IFBLK, rdev=NO_DRIVER, mode=0o660, gid=6),
    "fifo": Node(kind=stat.S_IFIFO, mode=0o622, xattrs={"trusted.t": b"1"}),
    "socket": Node(kind=stat.S_IFSOCK, mode=0o777, mtime_ns=-1),
}
CHANGES_METADATA: dict[str, Callable[[Path], None]] = {
    "chmod": lambda path: path.chmod(0o711),
    "chown": lambda path: os.chown(path, 33, 44, follow_symlinks=False),
    "utime": lambda path: os.utime(path, ns=(5, 6), follow_symlinks=False),
    "trusted xattr": lambda path: os.setxattr(path, "trusted.x", b"1", follow_symlinks=False),
    "rename": lambda path: path.rename(path.with_name("renamed")),
    "link": lambda path: os.link(path, path.with_name("linked"), follow_symlinks=False),
}


@pytest.mark.parametrize("way", CHANGES_METADATA)
def test_special_files_are_copied_up_as_such(stack: Stacks, way: str) -> None:
    """The oracle is the same call on a plain directory."""
    tree = {f"{case}/f": node for case, node in SPECIAL.items()}
    s = stack(tree)
    plain = stack(tree, mounted=False).lower
    for case in SPECIAL:
        CHANGES_METADATA[way](s.merged / case / "f")
        CHANGES_METADATA[way](plain / case / "f")
    want = twin.settled(dump_tree(plain))
    for _ in range(2):
        found = twin.settled(dump_tree(s.merged))
        assert diff_dumps(want, found) == []
        s.remount()


SYMLINKS = {
    "dangling": "nowhere",
    "to a file": "t",
    "loop": "f",
    "absolute": "/proc/self/exe",
    "long": "x/" * 2000,
}


@pytest.mark.parametrize("way", ["chown", "utime", "trusted xattr", "rename", "link"])
def test_symlinks_are_copied_up_as_such(stack: Stacks, way: str) -> None:
    s = stack({f"{case}/f": Symlink(to) for case, to in SYMLINKS.items()} | {"to a file/t": "x"})
    target = entry_of(s.merged, "to a file/t")
    numbers = {case: (s.merged / case / "f").lstat().st_ino for case in SYMLINKS}
    for case in SYMLINKS:
        CHANGES_METADATA[way](s.merged / case / "f")
    s.remount()
    name = "renamed" if way == "rename" else "f"
    for case, to in SYMLINKS.items():
        assert os.readlink(s.merged / case / name) == to
        assert os.readlink(s.upper / case / name) == to
        assert (s.merged / case / name).lstat().st_ino == numbers[case]
    assert entry_of(s.merged, "to a file/t") == target
    assert not os.path.lexists(s.upper / "to a file/t")


def test_symlink_into_the_mount_itself_is_copied_up(stack: Stacks) -> None:
    s = stack(mounted=False)
    (s.lower / "f").write_text("text")
    (s.lower / "link").symlink_to(s.merged / "f")
    s.start()
    os.setxattr(s.merged / "link", "trusted.x", b"1", follow_symlinks=False)
    assert os.listxattr(s.merged / "f") == []
    assert os.readlink(s.upper / "link") == str(s.merged / "f")


def test_fifo_of_a_lower_carries_data_after_its_copy_up(stack: Stacks) -> None:
    s = stack({"f": Node(kind=stat.S_IFIFO, mode=0o600)})
    reader = os.open(s.merged / "f", os.O_RDONLY | os.O_NONBLOCK)
    (s.merged / "f").chmod(0o640)
    writer = os.open(s.merged / "f", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    os.close(writer)


def test_socket_of_a_lower_can_be_replaced(stack: Stacks) -> None:
    s = stack({"s": SPECIAL["socket"]})
    (s.merged / "s").chmod(0o700)
    (s.merged / "s").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(s.merged / "s"))
    assert stat.S_ISSOCK((s.upper / "s").stat().st_mode)


# --- metadata alone ---------------------------------------------------------------------------

DATA = b"0123456789abcdef" * 65536
ONLY_METADATA = ("chmod", "chown", "utime", "setxattr")


def has_no_data(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO
    return False


@pytest.mark.parametrize("way", ONLY_METADATA)
def test_change_of_metadata_copies_no_data(stack: Stacks, way: str) -> None:
    s = stack({"f": DATA})
    COPIES_UP[way](s.merged / "f")
    assert (s.upper / "f").stat().st_size == len(DATA)
    assert has_no_data(s.upper / "f")
    if way != "setxattr":  # a further attribute may need a block
        assert (s.upper / "f").stat().st_blocks == 0
    assert os.getxattr(s.upper / "f", "trusted.overlay.metacopy") == b""


@pytest.mark.parametrize("way", ONLY_METADATA)
def test_metadata_copy_reads_the_data_below(stack: Stacks, way: str) -> None:
    s = stack({"f": DATA})
    COPIES_UP[way](s.merged / "f")
    assert (s.merged / "f").read_bytes() == DATA
    assert (s.merged / "f").stat().st_blocks == (s.lower / "f").stat().st_blocks
    s.remount()
    assert (s.merged / "f").read_bytes() == DATA


WRITES: dict[str, tuple[Callable[[int], None], bytes]] = {
    "start": (lambda fd: ignore(os.pwrite(fd, b"NEW", 0)), b"NEW" + DATA[3:]),
    "middle": (
        lambda fd: ignore(os.pwrite(fd, b"NEW", 500_000)),
        DATA[:500_000] + b"NEW" + DATA[500_003:],
    ),
    "end": (lambda fd: ignore(os.pwrite(fd, b"NEW", len(DATA))), DATA + b"NEW"),
    "truncate": (lambda fd: os.ftruncate(fd, 5), DATA[:5]),
    "nothing": (lambda _fd: None, DATA),
}


def ignore(_: object) -> None:
    return None


@pytest.mark.parametrize("remounted", [False, True], ids=["same-mount", "after-remount"])
def test_metadata_copy_written_to_has_all_data(stack: Stacks, remounted: bool) -> None:
    s = stack(dict.fromkeys(WRITES, DATA))
    for name in WRITES:
        (s.merged / name).chmod(0o600)
    numbers = {name: (s.merged / name).stat().st_ino for name in WRITES}
    if remounted:
        s.remount()
    for name, (write, want) in WRITES.items():
        fd = os.open(s.merged / name, os.O_RDWR)
        write(fd)
        os.close(fd)
        assert (s.merged / name).read_bytes() == want, name
        assert (s.upper / name).read_bytes() == want, name
        assert "trusted.overlay.metacopy" not in os.listxattr(s.upper / name)
    s.remount()
    for name, (_, want) in WRITES.items():
        assert (s.merged / name).read_bytes() == want, name
        found = (s.merged / name).stat()
        assert (name, stat.S_IMODE(found.st_mode), found.st_ino) == (name, 0o600, numbers[name])


def test_metadata_copy_of_a_renamed_file_finds_its_data(stack: Stacks) -> None:
    s = stack({"d/f": DATA, "e/": None})
    (s.merged / "d/f").chmod(0o600)
    (s.merged / "d/f").rename(s.merged / "e/g")
    (s.merged / "d/f").write_bytes(b"another")
    s.remount()
    assert has_no_data(s.upper / "e/g")
    assert (s.merged / "e/g").read_bytes() == DATA
    assert (s.merged / "d/f").read_bytes() == b"another"


def test_metadata_copy_of_an_empty_file_is_a_whole_copy(stack: Stacks) -> None:
    s = stack({"f": ""})
    (s.merged / "f").chmod(0o600)
    assert "trusted.overlay.metacopy" not in os.listxattr(s.upper / "f")


def test_metadata_copy_of_a_hard_linked_file_gets_data_for_all_names(stack: Stacks) -> None:
    s = stack({"a": DATA, "b": HardLink("a")})
    (s.merged / "a").chmod(0o600)
    s.remount()
    with (s.merged / "b").open("r+b") as file:
        file.write(b"NEW")
    s.remount()
    for name in ("a", "b"):
        assert (s.merged / name).read_bytes() == b"NEW" + DATA[3:]


# --- truncation -------------------------------------------------------------------------------


OLD_DATA = b"old" * 20_000
FROM = pytest.mark.parametrize("metacopy_first", [False, True], ids=["lower", "metacopy"])


@FROM
def test_file_overwritten_with_o_trunc_holds_no_old_byte(
    stack: Stacks, metacopy_first: bool
) -> None:
    written = {"empty": b"", "shorter": b"short", "longer": b"L" * 70_000}
    s = stack(dict.fromkeys(written, OLD_DATA))
    for name, new in written.items():
        if metacopy_first:
            (s.merged / name).chmod(0o600)
        (s.merged / name).read_bytes()
        with (s.merged / name).open("wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
            assert (s.upper / name).read_bytes() == new
        assert (s.merged / name).read_bytes() == new
    s.remount()
    for name, new in written.items():
        assert (s.merged / name).read_bytes() == new
        assert (s.upper / name).read_bytes() == new


@FROM
def test_truncated_file_has_the_data_up_to_there_and_zeros_behind(
    stack: Stacks, metacopy_first: bool
) -> None:
    sizes = (0, 1, 4096, 59_999, 60_000, 60_001, 200_000)
    want = {f"to {size}": OLD_DATA[:size].ljust(size, b"\0") for size in sizes}
    s = stack(dict.fromkeys(want, OLD_DATA))
    for name, data in want.items():
        if metacopy_first:
            (s.merged / name).chmod(0o600)
        (s.merged / name).read_bytes()
        os.truncate(s.merged / name, len(data))
        assert (s.merged / name).read_bytes() == data, name
    s.remount()
    for name, data in want.items():
        assert (s.merged / name).read_bytes() == data, name
        assert (s.upper / name).read_bytes() == data, name


def test_shrunk_and_grown_file_shows_zeros_where_old_bytes_were(stack: Stacks) -> None:
    s = stack({"f": b"old" * 20_000})
    os.truncate(s.merged / "f", 10)
    os.truncate(s.merged / "f", 50_000)
    s.remount()
    assert (s.merged / "f").read_bytes() == b"oldoldoldo".ljust(50_000, b"\0")


# --- what was open before ---------------------------------------------------------------------


@pytest.mark.parametrize("metacopy_first", [False, True], ids=["lower", "metacopy"])
def test_file_open_before_its_copy_up_reads_what_is_written_after(
    stack: Stacks, metacopy_first: bool
) -> None:
    s = stack({"f": b"old data"})
    if metacopy_first:
        (s.merged / "f").chmod(0o600)
    reader = os.open(s.merged / "f", os.O_RDONLY)
    assert os.pread(reader, 100, 0) == b"old data"
    with (s.merged / "f").open("r+b") as file:
        file.write(b"NEW")
    assert os.pread(reader, 100, 0) == b"NEW data"
    assert os.fstat(reader).st_ino == (s.merged / "f").stat().st_ino
    os.close(reader)


def test_file_open_before_its_metadata_copy_goes_on_reading(stack: Stacks) -> None:
    s = stack({"f": DATA})
    reader = os.open(s.merged / "f", os.O_RDONLY)
    (s.merged / "f").chmod(0o400)
    assert stat.S_IMODE(os.fstat(reader).st_mode) == 0o400
    assert os.pread(reader, 100, 1000) == DATA[1000:1100]
    os.close(reader)


def test_file_open_before_its_replacement_keeps_the_old_data(stack: Stacks) -> None:
    s = stack({"f": b"old data", "g": b"new"})
    reader = os.open(s.merged / "f", os.O_RDONLY)
    (s.merged / "g").rename(s.merged / "f")
    assert os.pread(reader, 100, 0) == b"old data"
    assert (s.merged / "f").read_bytes() == b"new"
    os.close(reader)


def test_many_writers_at_once_write_into_one_copy(stack: Stacks) -> None:
    size, writers = 4 * MIB, 8
    s = stack({"f": b"o" * size})

    def write(number: int) -> int:
        fd = os.open(s.merged / "f", os.O_RDWR)
        try:
            os.pwrite(fd, b"N" * 1000, number * 100_000)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    with ThreadPoolExecutor(writers) as pool:
        numbers = set(pool.map(write, range(writers)))
    assert len(numbers) == 1
    want = bytearray(b"o" * size)
    for number in range(writers):
        want[number * 100_000 : number * 100_000 + 1000] = b"N" * 1000
    assert (s.merged / "f").read_bytes() == want


# --- while a large file is being copied -------------------------------------------------------


@contextmanager
def slow_stack(stack: Stacks, size_bytes: int) -> Iterator[tuple[Stack, Gate]]:
    """A stack whose file `large` comes from a disk that does not answer until told."""
    s = stack([{"d/f": "text", "d/g": "text"}, {}], mounted=False)
    with gated(s.lowers[1], size_bytes) as gate:
        s.start()
        yield s, gate
        s.unmount()


@contextmanager
def being_copied(s: Stack, gate: Gate) -> Iterator[Future[int]]:
    """Somebody has opened `large` for writing and now waits for its copy."""
    with ThreadPoolExecutor(1) as pool:
        opener = pool.submit(os.open, s.merged / "large", os.O_RDWR)
        gate.wait_for_reader()
        try:
            yield opener
        finally:
            gate.fail()


def use_the_rest(root: Path) -> None:
    """What another process may want to do meanwhile, a little of everything."""
    assert sorted(os.listdir(root)) == ["d", "large"]
    assert sorted(os.listdir(root / "d")) == ["f", "g"]
    assert (root / "d/f").read_text() == "text"
    (root / "d/f").write_text("changed")
    (root / "d/g").rename(root / "d/h")
    (root / "new").mkdir()
    assert (root / "large").stat().st_size == 2 * GIB


def test_copy_up_of_a_large_file_lets_others_go_on(stack: Stacks) -> None:
    """The copy cannot end before the gate opens, so all that ends before did not wait for it."""
    with slow_stack(stack, 2 * GIB) as (s, gate):
        with being_copied(s, gate) as opener:
            other = multiprocessing.get_context("fork").Process(
                target=use_the_rest, args=(s.merged,)
            )
            other.start()
            other.join(ANSWER_TIMEOUT_S)
            assert other.exitcode == 0
            assert not opener.done()
        with pytest.raises(OSError, match="Input/output error"):
            opener.result(ANSWER_TIMEOUT_S)
        assert not (s.upper / "large").exists()
        assert (s.merged / "d/f").read_text() == "changed"


def test_failed_copy_up_leaves_the_file_as_it_was(stack: Stacks) -> None:
    with slow_stack(stack, 8 * MIB) as (s, gate):
        before = (s.merged / "large").stat()
        with being_copied(s, gate) as opener:
            gate.fail()
        assert opener.exception(ANSWER_TIMEOUT_S).errno == errno.EIO  # type: ignore[union-attr]
        assert (s.merged / "large").stat() == before
        assert list((s.work / "work").iterdir()) == []
        (s.merged / "large").chmod(0o600)
        assert stat.S_IMODE((s.merged / "large").stat().st_mode) == 0o600
        os.truncate(s.merged / "large", 0)  # or it would miss its data once the gate is gone


def test_file_unlinked_while_it_is_copied_stays_usable_and_gone(stack: Stacks) -> None:
    with slow_stack(stack, 8 * MIB) as (s, gate):
        with being_copied(s, gate) as opener:
            (s.merged / "large").unlink()
            assert "large" not in os.listdir(s.merged)
            gate.open()
            fd = opener.result(ANSWER_TIMEOUT_S)
        os.pwrite(fd, b"NEW", 0)
        assert os.pread(fd, 5, 0) == b"NEW" + BYTE * 2
        assert os.fstat(fd).st_nlink == 0
        os.close(fd)
        s.remount()
        assert "large" not in os.listdir(s.merged)


def test_file_replaced_while_it_is_copied_is_the_new_one(stack: Stacks) -> None:
    with slow_stack(stack, 8 * MIB) as (s, gate):
        with being_copied(s, gate) as opener:
            (s.merged / "d/f").rename(s.merged / "large")
            gate.open()
            fd = opener.result(ANSWER_TIMEOUT_S)
        os.pwrite(fd, b"NEW", 0)
        os.close(fd)
        assert (s.merged / "large").read_text() == "text"
        s.remount()
        assert (s.merged / "large").read_text() == "text"


MEANWHILE: dict[str, Callable[[Path], None]] = {
    "chmod": lambda root: (root / "large").chmod(0o600),
    "chmod of the parent": lambda root: root.chmod(0o711),
    "rename": lambda root: ignore((root / "large").rename(root / "large2")),
    "rename into another directory": lambda root: ignore((root / "large").rename(root / "d/l")),
    "link": lambda root: os.link(root / "large", root / "large2"),
    "truncate": lambda root: os.truncate(root / "large", 3 * MIB),
    "open and truncate": lambda root: ignore((root / "large").write_bytes(b"new")),
    "setxattr": lambda root: os.setxattr(root / "large", "user.x", b"1"),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_change_asked_for_while_a_file_is_copied_is_made(stack: Stacks, what: str) -> None:
    """The oracle is the same change on a plain directory."""
    size = 8 * MIB
    plain = stack({"large": BYTE * size, "d/f": "text", "d/g": "text"}, mounted=False).lower
    MEANWHILE[what](plain)
    want = dump_tree(plain, nlink=False)
    with slow_stack(stack, size) as (s, gate):
        with being_copied(s, gate) as opener, ThreadPoolExecutor(1) as pool:
            change = pool.submit(MEANWHILE[what], s.merged)
            gate.open()
            change.result(ANSWER_TIMEOUT_S)
            os.close(opener.result(ANSWER_TIMEOUT_S))
        for _ in range(2):
            found = dump_tree(s.merged, nlink=False)
            assert diff_dumps(want, found, ignore=["mtime_ns"]) == []
            s.remount()


def test_killed_opener_does_not_stop_the_copy(stack: Stacks) -> None:
    with slow_stack(stack, 8 * MIB) as (s, gate):
        opener = multiprocessing.get_context("fork").Process(
            target=os.open, args=(s.merged / "large", os.O_RDWR)
        )
        opener.start()
        gate.wait_for_reader()
        opener.kill()
        gate.open()
        opener.join(ANSWER_TIMEOUT_S)
        assert opener.exitcode == -signal.SIGKILL
        with (s.merged / "large").open("r+b") as file:
            file.write(b"NEW")
        assert (s.merged / "large").read_bytes() == b"NEW" + BYTE * (8 * MIB - 3)
