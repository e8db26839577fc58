"""What is in files and directories: mappings, locks, holes, far offsets, odd names, long listings."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.stack import Stacks, is_whiteout
from tests.support.trees import Content, Node
from tests.support.users import errno_of, run_as

PAGE = mmap.PAGESIZE
GIB = 1 << 30
FUSE_SUPER_MAGIC = b"65735546"  # linux/magic.h


# --- mappings ------------------------------------------------------------------------------------


def test_mapping_made_before_copy_up_shows_what_is_written_after(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE * 2})
    with open(s.merged / "file", "rb") as file:
        area = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        assert area[:4] == b"aaaa"
        with open(s.merged / "file", "r+b") as writer:
            writer.write(b"bbbb")
        assert area[:4] == b"bbbb"
        assert area[PAGE : PAGE + 4] == b"aaaa"
        area.close()


def test_mapping_never_touched_before_copy_up_shows_what_is_written_after(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE * 2})
    with open(s.merged / "file", "rb") as file:
        area = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        (s.merged / "file").write_bytes(b"c" * PAGE * 2)
        assert area[PAGE : PAGE + 4] == b"cccc"
        area.close()


def test_shared_mapping_and_write_see_each_other(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE})
    with open(s.merged / "file", "r+b", buffering=0) as file:
        area = mmap.mmap(file.fileno(), 0)
        area[:4] = b"mmap"
        assert os.pread(file.fileno(), 4, 0) == b"mmap"
        os.pwrite(file.fileno(), b"writ", 8)
        assert area[8:12] == b"writ"
        area.close()
    s.remount()
    assert (s.merged / "file").read_bytes() == b"mmapaaaawrit" + b"a" * (PAGE - 12)


def test_msync_reaches_the_upper_file(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE})
    with open(s.merged / "file", "r+b") as file, mmap.mmap(file.fileno(), 0) as area:
        area[:4] = b"sync"
        area.flush()
        assert (s.upper / "file").read_bytes()[:4] == b"sync"
    assert (s.lower / "file").read_bytes() == b"a" * PAGE


def test_two_shared_mappings_are_one_memory(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE})
    with open(s.merged / "file", "r+b") as first, open(s.merged / "file", "r+b") as second:
        one, other = mmap.mmap(first.fileno(), 0), mmap.mmap(second.fileno(), 0)
        one[100:104] = b"here"
        assert other[100:104] == b"here"
        one.close()
        other.close()


def test_write_to_private_mapping_stays_private(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE})
    with open(s.merged / "file", "rb") as file:
        area = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        area[:4] = b"mine"
        assert area[:4] == b"mine"
        assert (s.merged / "file").read_bytes() == b"a" * PAGE
        area.close()
    assert not (s.upper / "file").exists()


def test_mapping_outlives_descriptor_and_name(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE * 64})
    fd = os.open(s.merged / "file", os.O_RDWR)
    area = mmap.mmap(fd, 0)
    os.close(fd)
    (s.merged / "file").unlink()
    area[PAGE * 60 : PAGE * 60 + 4] = b"last"
    assert area[PAGE * 60 : PAGE * 60 + 4] == b"last"
    assert area[PAGE * 30 : PAGE * 30 + 1] == b"a"
    area.close()


# --- locks ---------------------------------------------------------------------------------------

F_OFD_SETLK = 37  # asm-generic/fcntl.h
FLOCK = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
LOCKS: dict[str, Callable[[int], object]] = {
    "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "fcntl": lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "ofd": lambda fd: fcntl.fcntl(fd, F_OFD_SETLK, FLOCK),
}


def is_locked(path: Path, kind: str) -> bool:
    """Whether another process is refused the lock."""

    def attempt() -> int:
        fd = os.open(path, os.O_RDWR)
        return errno_of(lambda: LOCKS[kind](fd))

    failed = run_as(0, attempt)
    assert failed in {0, errno.EAGAIN, errno.EACCES}
    return failed != 0


@pytest.mark.parametrize("kind", LOCKS)
def test_lock_holds_and_is_released(stack: Stacks, kind: str) -> None:
    s = stack({"file": "text"})
    assert not is_locked(s.merged / "file", kind)
    fd = os.open(s.merged / "file", os.O_RDWR)
    LOCKS[kind](fd)
    assert is_locked(s.merged / "file", kind)
    os.close(fd)
    assert not is_locked(s.merged / "file", kind)


def test_flock_on_lower_file_holds_across_copy_up_and_rename(stack: Stacks) -> None:
    s = stack({"file": "text"})
    fd = os.open(s.merged / "file", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (s.merged / "file").write_text("copied up")
    assert is_locked(s.merged / "file", "flock")
    (s.merged / "file").rename(s.merged / "moved")
    assert is_locked(s.merged / "moved", "flock")
    os.close(fd)
    assert not is_locked(s.merged / "moved", "flock")


def test_record_locks_are_apart_by_range(stack: Stacks) -> None:
    s = stack({"file": "text" * 100})

    def second_half() -> int:
        fd = os.open(s.merged / "file", os.O_RDWR)
        failed = errno_of(lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 100, 50))
        assert failed in {errno.EAGAIN, errno.EACCES}
        return errno_of(lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 100, 100))

    with open(s.merged / "file", "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 100, 0)
        assert run_as(0, second_half) == 0


# --- sparse files and far offsets ----------------------------------------------------------------


def make_sparse(path: Path) -> None:
    """5 GiB of hole with three islands."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    os.pwrite(fd, b"head", 0)
    os.pwrite(fd, b"middle", 4 * GIB - 3)
    os.ftruncate(fd, 5 * GIB)
    os.close(fd)


def assert_islands(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        assert os.fstat(fd).st_size >= 5 * GIB
        assert os.pread(fd, 6, 0) == b"head\0\0"
        assert os.pread(fd, 8, 4 * GIB - 4) == b"\0middle\0"
        assert os.pread(fd, 4, 3 * GIB) == bytes(4)
        assert os.pread(fd, 100, os.fstat(fd).st_size) == b""
    finally:
        os.close(fd)


def test_sparse_lower_file_over_4_gib_is_read_as_it_is(stack: Stacks) -> None:
    s = stack(mounted=False)
    make_sparse(s.lower / "big")
    s.start()
    assert_islands(s.merged / "big")
    assert (s.merged / "big").stat().st_blocks == (s.lower / "big").stat().st_blocks


def test_copy_up_of_sparse_file_keeps_holes(stack: Stacks) -> None:
    s = stack(mounted=False)
    make_sparse(s.lower / "big")
    s.start()
    with open(s.merged / "big", "r+b") as file:
        file.seek(5 * GIB)
        file.write(b"tail")
    assert_islands(s.merged / "big")
    assert (s.upper / "big").stat().st_size == 5 * GIB + 4
    assert (s.upper / "big").stat().st_blocks * 512 < 1 << 20
    s.remount()
    assert_islands(s.merged / "big")


def test_write_and_truncate_beyond_4_gib(stack: Stacks) -> None:
    s = stack({"small": "text"})
    path = s.merged / "small"
    os.truncate(path, 6 * GIB)
    fd = os.open(path, os.O_RDWR)
    assert os.pwrite(fd, b"far", 5 * GIB + 1) == 3
    assert os.pread(fd, 5, 5 * GIB) == b"\0far\0"
    os.ftruncate(fd, 5 * GIB + 2)
    assert os.lseek(fd, 0, os.SEEK_END) == 5 * GIB + 2
    os.close(fd)
    assert (s.upper / "small").stat().st_size == 5 * GIB + 2
    assert (s.upper / "small").stat().st_blocks * 512 < 1 << 20


def test_hole_left_by_a_write_reads_as_zeros(stack: Stacks) -> None:
    s = stack({"file": "text"})
    with open(s.merged / "file", "r+b") as file:
        file.seek(100_000)
        file.write(b"end")
    assert (s.merged / "file").read_bytes() == b"text" + bytes(99_996) + b"end"


# --- reading and writing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lower", "fresh"])
def test_two_processes_append_whole_records(stack: Stacks, name: str) -> None:
    s = stack({"lower": ""})
    path = s.merged / name
    path.touch()
    children = []
    for letter in (b"x", b"y"):
        pid = os.fork()
        if pid == 0:
            try:
                fd = os.open(path, os.O_WRONLY | os.O_APPEND)
                for _ in range(400):
                    os.write(fd, letter * 99 + b"\n")
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    lines = path.read_bytes().splitlines()
    assert sorted(lines) == [b"x" * 99] * 400 + [b"y" * 99] * 400


def test_direct_io_reads_and_writes(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE * 4})
    fd = os.open(s.merged / "file", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, PAGE * 2) as area:
        area[:] = b"d" * PAGE * 2
        assert os.pwritev(fd, [area], PAGE) == PAGE * 2
        assert os.preadv(fd, [area], PAGE * 2) == PAGE * 2
        assert area[:] == b"d" * PAGE + b"a" * PAGE
    os.close(fd)
    want = b"a" * PAGE + b"d" * PAGE * 2 + b"a" * PAGE
    assert (s.merged / "file").read_bytes() == (s.upper / "file").read_bytes() == want


def test_direct_and_cached_io_agree(stack: Stacks) -> None:
    s = stack({"file": "a" * PAGE * 2})
    assert (s.merged / "file").read_bytes() == b"a" * PAGE * 2
    fd = os.open(s.merged / "file", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, PAGE) as area:
        area[:] = b"d" * PAGE
        os.pwritev(fd, [area], 0)
    os.close(fd)
    assert (s.merged / "file").read_bytes() == b"d" * PAGE + b"a" * PAGE


def test_contents_of_many_sizes_round_trip(stack: Stacks) -> None:
    sizes = [0, 1, PAGE - 1, PAGE, PAGE + 1, 131_072, 1_048_575, 1_048_577, 3_000_001]
    tree: dict[str | bytes, Content] = {f"{size}": os.urandom(size) for size in sizes}
    s = stack(tree)
    for name, content in tree.items():
        assert isinstance(content, bytes)
        read = (s.merged / os.fsdecode(name)).read_bytes()
        assert hashlib.sha256(read).digest() == hashlib.sha256(content).digest()
        (s.merged / f"copy-{os.fsdecode(name)}").write_bytes(content)
        assert (s.upper / f"copy-{os.fsdecode(name)}").read_bytes() == content


def test_fsync_and_its_kin_succeed(stack: Stacks) -> None:
    s = stack({"file": "text", "dir/": None})
    for path, flags in ((s.merged / "file", os.O_RDWR), (s.merged / "dir", os.O_RDONLY)):
        fd = os.open(path, flags)
        os.fsync(fd)
        os.fdatasync(fd)
        assert libc.syncfs(fd) == 0
        os.close(fd)


# --- names ---------------------------------------------------------------------------------------


def test_names_of_255_bytes_work_in_every_call(stack: Stacks) -> None:
    lower, fresh, third = b"l" * 255, b"f" * 255, b"t" * 255
    s = stack({lower: "text", b"d" * 255 + b"/": None})
    top = bytes(s.merged)
    assert Path(os.fsdecode(top + b"/" + lower)).read_text() == "text"
    os.chmod(top + b"/" + lower, 0o600)
    os.rename(top + b"/" + lower, top + b"/" + fresh)
    os.link(top + b"/" + fresh, top + b"/" + third)
    os.unlink(top + b"/" + fresh)
    os.mkdir(top + b"/" + fresh)
    os.rename(top + b"/" + b"d" * 255, top + b"/" + b"e" * 255)
    assert sorted(os.listdir(top)) == [b"e" * 255, fresh, third]
    assert is_whiteout(s.upper / os.fsdecode(lower))
    s.remount()
    assert sorted(os.listdir(top)) == [b"e" * 255, fresh, third]


TOO_LONG: dict[str, Callable[[bytes, bytes], object]] = {
    "stat": lambda long, _: os.stat(long),
    "open": lambda long, _: os.open(long, os.O_RDONLY),
    "create": lambda long, _: os.open(long, os.O_CREAT | os.O_WRONLY),
    "mkdir": lambda long, _: os.mkdir(long),
    "mknod": lambda long, _: os.mknod(long),
    "symlink": lambda long, _: os.symlink("target", long),
    "link": lambda long, file: os.link(file, long),
    "rename": lambda long, file: os.rename(file, long),
    "rename of it": os.rename,
    "unlink": lambda long, _: os.unlink(long),
    "rmdir": lambda long, _: os.rmdir(long),
}


@pytest.mark.parametrize("options", [(), ("timeout=0",)], ids=["cached", "uncached"])
def test_longer_names_are_refused_in_every_call(stack: Stacks, options: tuple[str, ...]) -> None:
    s = stack({"file": "text"}, options=options)
    for length in (256, 1000):
        long = bytes(s.merged) + b"/" + b"n" * length
        for what, call in TOO_LONG.items():
            failed = errno_of(lambda call=call, long=long: call(long, bytes(s.merged / "file")))
            assert (what, length, failed) == (what, length, errno.ENAMETOOLONG)
    assert os.listdir(s.merged) == ["file"]


def test_names_that_are_not_utf8_work_in_every_call(stack: Stacks) -> None:
    odd = [b"\xff\xfe", b"caf\xe9", bytes(range(1, 47)) + bytes(range(48, 256)), b" ", b"-", b"\n"]
    s = stack({name: b"of " + name for name in odd})
    top = bytes(s.merged)
    assert sorted(os.listdir(top)) == sorted(odd)
    for name in odd:
        with open(top + b"/" + name, "r+b") as file:
            assert file.read() == b"of " + name
            file.write(b"!")
        os.rename(top + b"/" + name, top + b"/x" + name[:200])
        os.symlink(name, top + b"/" + name)
        assert os.readlink(top + b"/" + name) == name
    s.remount()
    assert sorted(os.listdir(top)) == sorted(odd + [b"x" + name[:200] for name in odd])


def test_deep_path_beyond_path_max(stack: Stacks) -> None:
    s = stack({"start/": None})
    fds = [os.open(s.merged / "start", os.O_RDONLY | os.O_DIRECTORY)]
    for _ in range(20):  # 20 * 250 > PATH_MAX
        os.mkdir("n" * 250, dir_fd=fds[-1])
        fds.append(os.open("n" * 250, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fds[-1]))
    fd = os.open("file", os.O_CREAT | os.O_RDWR, 0o600, dir_fd=fds[-1])
    os.write(fd, b"deep")
    os.rename("file", "moved", src_dir_fd=fds[-1], dst_dir_fd=fds[0])
    assert sorted(os.listdir(fds[0])) == ["moved", "n" * 250]
    for open_fd in (fd, *fds):
        os.close(open_fd)
    assert (s.merged / "start/moved").read_text() == "deep"


# --- listings ------------------------------------------------------------------------------------


def test_directory_of_100_000_entries(stack: Stacks) -> None:
    s = stack({"many/": None, "many/keep/": None}, mounted=False)
    many = s.lower / "many"
    for number in range(0, 100_000, 1000):
        (many / f"{number}").touch()
        for link in range(number + 1, number + 1000):  # links are made faster than files
            os.link(many / f"{number}", many / f"{link}")
    s.start()
    (s.merged / "many/5").unlink()
    (s.merged / "many/new").touch()
    with os.scandir(s.merged / "many") as listing:
        found = [entry.name for entry in listing]
    assert len(found) == 100_001
    assert set(found) == {"new", "keep", *(str(n) for n in range(100_000) if n != 5)}


libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir64.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
libc.telldir.argtypes = libc.rewinddir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
libc.readdir64.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


class Directory:
    """opendir(3) and its kin, which Python does not offer."""

    def __init__(self, path: Path) -> None:
        self.stream = libc.opendir(bytes(path))
        assert self.stream

    def read(self) -> str | None:
        """The next name; None at the end."""
        entry = libc.readdir64(self.stream)
        # struct dirent64: ino, off (8 bytes each), reclen (2), type (1), name
        return os.fsdecode(ctypes.string_at(entry + 19)) if entry else None

    def rest(self) -> list[str]:
        names = []
        while (name := self.read()) is not None:
            names.append(name)
        return names

    def tell(self) -> int:
        return int(libc.telldir(self.stream))

    def seek(self, cookie: int) -> None:
        libc.seekdir(self.stream, cookie)

    def rewind(self) -> None:
        libc.rewinddir(self.stream)

    def close(self) -> None:
        libc.closedir(self.stream)


def hall(entries: int) -> dict[str | bytes, Content]:
    return {"hall/": None, **{f"hall/{number:05}": "" for number in range(entries)}}


def test_seekdir_returns_to_where_telldir_was(stack: Stacks) -> None:
    s = stack(hall(3000))
    directory = Directory(s.merged / "hall")
    for _ in range(1000):
        directory.read()
    cookie = directory.tell()
    rest = directory.rest()
    assert len(rest) == 3002 - 1000
    directory.seek(cookie)
    assert directory.rest() == rest
    directory.close()


def test_cookie_stays_good_when_entries_before_it_go(stack: Stacks) -> None:
    s = stack(hall(3000))
    directory = Directory(s.merged / "hall")
    seen = [directory.read() for _ in range(1500)]
    cookie = directory.tell()
    rest = directory.rest()
    for name in seen:
        if name not in {".", "..", None}:
            (s.merged / "hall" / str(name)).unlink()
    directory.seek(cookie)
    assert directory.rest() == rest
    directory.close()


def test_rewinddir_shows_what_changed(stack: Stacks) -> None:
    s = stack(hall(10))
    directory = Directory(s.merged / "hall")
    assert len(directory.rest()) == 12
    (s.merged / "hall/00003").unlink()
    (s.merged / "hall/new").touch()
    directory.rewind()
    names = directory.rest()
    assert len(names) == 12
    assert "new" in names
    assert "00003" not in names
    directory.close()


def test_listing_is_stable_while_entries_come_and_go(stack: Stacks) -> None:
    s = stack(hall(4000))
    top = s.merged / "hall"
    listed = []
    with os.scandir(top) as listing:
        for place, entry in enumerate(listing):
            listed.append(entry.name)
            if place % 10 == 0 and int(entry.name) % 2:
                (top / entry.name).unlink()
            if place % 10 == 1:
                (top / f"new{place}").touch()
            if place % 10 == 2 and int(entry.name) % 2 == 0:
                (top / entry.name).rename(top / f"moved{entry.name}")
    assert len(listed) == len(set(listed))
    old = {name for name in listed if name.isdigit()}
    assert {name for name in os.listdir(top) if name.isdigit()} <= old


def test_removing_while_listing_empties_the_directory(stack: Stacks) -> None:
    s = stack(hall(3000))
    with os.scandir(s.merged / "hall") as listing:
        for entry in listing:
            os.unlink(entry)
    assert os.listdir(s.merged / "hall") == []
    (s.merged / "hall").rmdir()


def test_renaming_while_listing_visits_each_entry_once(stack: Stacks) -> None:
    s = stack(hall(2000))
    visited = 0
    with os.scandir(s.merged / "hall") as listing:
        for entry in listing:
            if not entry.name.startswith("done"):
                os.rename(entry, s.merged / "hall" / f"done{entry.name}")
                visited += 1
    assert visited == 2000
    assert len(os.listdir(s.merged / "hall")) == 2000


def test_listing_of_removed_directory_is_empty(stack: Stacks) -> None:
    s = stack({"dir/": None})
    fd = os.open(s.merged / "dir", os.O_RDONLY)
    (s.merged / "dir").rmdir()
    assert os.listdir(fd) == []
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_listed_types_and_numbers_are_those_of_stat(stack: Stacks) -> None:
    tree: dict[str | bytes, Content] = {"d/": None, "f": "text"}
    tree |= {"p": Node(kind=stat.S_IFIFO), "c": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3))}
    s = stack(tree)
    (s.merged / "link").symlink_to("f")
    (s.merged / "f").chmod(0o600)
    with os.scandir(s.merged) as listing:
        for entry in listing:
            status = entry.stat(follow_symlinks=False)
            assert entry.inode() == status.st_ino
            assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(status.st_mode)
            assert entry.is_symlink() == stat.S_ISLNK(status.st_mode)
            assert entry.is_file(follow_symlinks=False) == stat.S_ISREG(status.st_mode)


# --- the file system as a whole ------------------------------------------------------------------


def test_statfs_is_that_of_the_upper_file_system(stack: Stacks) -> None:
    s = stack({"file": "text"})
    for path in (s.merged, s.merged / "file"):
        seen, host = os.statvfs(path), os.statvfs(s.upper)
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
            assert (field, getattr(seen, field)) == (field, getattr(host, field))
        assert abs(seen.f_bfree - host.f_bfree) * seen.f_frsize < GIB
    assert seen.f_namemax == 255
    magic = subprocess.run(["stat", "-f", "-c", "%t", s.merged], check=True, capture_output=True)
    assert magic.stdout.strip() == FUSE_SUPER_MAGIC


def test_statfs_of_read_only_stack_is_that_of_the_topmost_lower(stack: Stacks) -> None:
    s = stack({"file": "text"}, upper=None)
    assert os.statvfs(s.merged).f_blocks == os.statvfs(s.lower).f_blocks
    assert os.statvfs(s.merged).f_flag & os.ST_RDONLY
