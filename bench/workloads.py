"""What is timed. A workload names its layers, the state of the caches, and one piece of work.

A piece runs in a child process and returns what it measured itself, so that its own preparation
(opening a directory, starting threads) is not part of the time.
"""

import enum
import os
import random
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.child import BenchError, run
from bench.fixtures import BLOCK_BYTES, Fixtures
from bench.peers import Peer, Stack, rss_mib, server_pids

PAGE_BYTES = 4096
# Headers that a C program may include together; those that the tree lacks are left out.
HEADERS = """
    assert.h complex.h ctype.h dirent.h errno.h fcntl.h fenv.h fnmatch.h ftw.h getopt.h glob.h grp.h
    iconv.h ifaddrs.h inttypes.h langinfo.h libgen.h limits.h link.h locale.h math.h mntent.h mqueue.h
    netdb.h poll.h pthread.h pwd.h regex.h resolv.h sched.h search.h semaphore.h setjmp.h shadow.h
    signal.h spawn.h stdio.h stdlib.h string.h syslog.h tar.h termios.h time.h ucontext.h unistd.h
    utime.h wchar.h wctype.h wordexp.h arpa/inet.h net/if.h netinet/in.h netinet/tcp.h
    sys/epoll.h sys/eventfd.h sys/inotify.h sys/ipc.h sys/mman.h sys/ptrace.h sys/resource.h
    sys/select.h sys/sem.h sys/shm.h sys/signalfd.h sys/socket.h sys/stat.h sys/statvfs.h
    sys/sysinfo.h sys/time.h sys/timerfd.h sys/types.h sys/uio.h sys/un.h sys/utsname.h sys/wait.h
    sys/xattr.h linux/fuse.h linux/if_link.h linux/netlink.h linux/rtnetlink.h linux/types.h
"""


class Caches(enum.Enum):
    """What the kernel remembers when the clock starts. The mount itself is always fresh."""

    COLD = "cold"
    DISK = "disk"
    WARM = "warm"
    PAGES = "pages"

    @property
    def meaning(self) -> str:
        """The state in words, for the foot of the table."""
        return {
            Caches.COLD: "fresh mount, dentries and inodes dropped (drop_caches 2)",
            Caches.DISK: "fresh mount, dentries, inodes and pages dropped (drop_caches 3)",
            Caches.WARM: "fresh mount, then one untimed pass of the same work",
            Caches.PAGES: "as cold, then the lower file read into the page cache",
        }[self]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one workload on one peer, as its piece sees it."""

    peer: Peer
    stack: Stack
    fixtures: Fixtures

    @property
    def mountpoint(self) -> Path:
        """Where the union is."""
        return self.stack.mountpoint


@dataclass(frozen=True, slots=True)
class Workload:
    """A row of the table."""

    name: str
    what: str
    caches: Caches
    lowers: Callable[[Fixtures], Sequence[Path]]
    piece: Callable[[Run], float | None]
    unit: str = "s"
    mounts_itself: bool = False
    preread: str | None = None


def seconds_of(argv: Sequence[str], *, cwd: Path) -> float:
    """How long a command takes, from start to end."""
    start = time.perf_counter()
    run(argv, cwd=cwd)
    return time.perf_counter() - start


def walk(this: Run) -> float:
    """List every directory and stat every entry."""
    return seconds_of(["find", ".", "-printf", "%s\\n"], cwd=this.mountpoint)


def tar(this: Run) -> float:
    """Read the named files as an archive; through a pipe, since tar reads nothing for /dev/null."""
    names = shlex.quote(os.fspath(this.fixtures.tar_list))
    script = f"tar -cf - -T {names} | cat >/dev/null"
    return seconds_of(["sh", "-c", script], cwd=this.mountpoint)


def untar(this: Run) -> float:
    """Unpack an archive into a new directory."""
    target = this.mountpoint / "untar"
    archive = os.fspath(this.fixtures.archive)
    target.mkdir()
    return seconds_of(["tar", "-xf", archive], cwd=target)


def create(this: Run) -> float:
    """Create files in one new directory, a few bytes in each."""
    folder = this.mountpoint / "created"
    folder.mkdir()
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    start = time.perf_counter()
    for number in range(this.fixtures.sizes.new_files):
        fd = os.open(f"f{number:05}", flags, 0o644, dir_fd=folder_fd)
        os.write(fd, b"sixteen bytes...")
        os.close(fd)
    return time.perf_counter() - start


def unlink(this: Run) -> float:
    """Remove lower files, each of which leaves a whiteout."""
    folder_fd = os.open(this.mountpoint / "files", os.O_RDONLY | os.O_DIRECTORY)
    start = time.perf_counter()
    for number in range(this.fixtures.sizes.new_files):
        os.unlink(f"f{number:04}", dir_fd=folder_fd)
    return time.perf_counter() - start


def write(this: Run) -> float:
    """Write one new file in blocks of 1 MiB and make it durable."""
    block = bytes(range(256)) * (BLOCK_BYTES // 256)
    start = time.perf_counter()
    fd = os.open(this.mountpoint / "written", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    for _ in range(this.fixtures.sizes.write_mib):
        os.write(fd, block)
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - start


def compile_c(this: Run) -> float:
    """Compile a file that includes many headers, all of them from the mount."""
    include = this.mountpoint / "usr" / "include"
    folders = [include, *sorted(include.glob("*-linux-gnu"))]
    lower = this.fixtures.debian / "usr" / "include"
    lower_folders = [lower, *sorted(lower.glob("*-linux-gnu"))]
    names = [
        name for name in HEADERS.split() if any((top / name).is_file() for top in lower_folders)
    ]
    if not names:
        msg = "no C headers below /usr/include"
        raise BenchError(msg)
    source = this.stack.base / "many.c"
    lines = ["#define _GNU_SOURCE", *(f"#include <{name}>" for name in names)]
    source.write_text("\n".join([*lines, "int main(void) { return 0; }", ""]))
    search = [word for folder in folders for word in ("-isystem", os.fspath(folder))]
    argv = ["gcc", *search, "-c", os.fspath(source), "-o", "many.o"]
    compiles = range(this.fixtures.sizes.compiles)
    return sum(seconds_of(argv, cwd=this.mountpoint) for _ in compiles)


def open_in_parallel(this: Run) -> float:
    """Open as many files as there are threads, all at once, and hold them open until the last."""
    names = this.fixtures.tree_files[: this.fixtures.sizes.opens]
    gate = threading.Barrier(len(names) + 1)
    failures: list[OSError] = []

    def open_one(name: str) -> None:
        gate.wait()
        try:
            fd = os.open(this.mountpoint / name, os.O_RDONLY)
        except OSError as e:
            failures.append(e)
            gate.abort()
            return
        gate.wait()
        os.close(fd)

    threads = [threading.Thread(target=open_one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    gate.wait()
    try:
        gate.wait()
    except threading.BrokenBarrierError:
        raise failures[0] from None
    elapsed = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return elapsed


def copy_up(this: Run) -> float:
    """Append one byte to a large lower file and make it durable.

    The fsync is part of it: some copy up durably and some leave that to the caller, so only the whole
    compares like with like.
    """
    start = time.perf_counter()
    fd = os.open(this.mountpoint / "copyup", os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"x")
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - start


def mount_and_list(this: Run) -> float:
    """Mount a tall stack and list its root once."""
    start = time.perf_counter()
    this.peer.mount(this.stack)
    run(["ls"], cwd=this.mountpoint)
    return time.perf_counter() - start


def read_at_random(this: Run) -> float:
    """Read single pages at random places of a lower file."""
    sizes = this.fixtures.sizes
    pages = sizes.random_file_mib * BLOCK_BYTES // PAGE_BYTES
    places = random.Random(1).choices(range(pages), k=sizes.random_reads)
    fd = os.open(this.mountpoint / "random", os.O_RDONLY)
    start = time.perf_counter()
    for place in places:
        if len(os.pread(fd, PAGE_BYTES, place * PAGE_BYTES)) != PAGE_BYTES:
            msg = "a short read"
            raise BenchError(msg)
    return time.perf_counter() - start


def memory(this: Run) -> float | None:
    """Resident memory of the server after a walk over many files; no server, no number."""
    if not this.peer.is_fuse:
        return None
    walk(this)
    return rss_mib(server_pids(this.mountpoint))


def _tree(fixtures: Fixtures) -> Sequence[Path]:
    # The lists are made here, before the clock and in the parent, which keeps them.
    assert fixtures.tar_list.exists()
    assert fixtures.archive.exists()
    return [fixtures.debian]


def _wide(fixtures: Fixtures) -> Sequence[Path]:
    return [fixtures.wide]


def _flat(fixtures: Fixtures) -> Sequence[Path]:
    return [fixtures.flat]


def _large(fixtures: Fixtures) -> Sequence[Path]:
    return [fixtures.large]


def _layers(fixtures: Fixtures) -> Sequence[Path]:
    return fixtures.layers


COLD, DISK, WARM, PAGES = Caches.COLD, Caches.DISK, Caches.WARM, Caches.PAGES

WORKLOADS = (
    Workload("find-cold", "find with stat, Debian tree", COLD, _tree, walk),
    Workload("find-warm", "find with stat, Debian tree", WARM, _tree, walk),
    Workload("tar", "tar of 7 400 files", WARM, _tree, tar),
    Workload("untar", "untar of 2 600 files", COLD, _tree, untar),
    Workload("create", "create 5 000 files", COLD, _tree, create),
    Workload("unlink", "unlink 5 000 lower files", COLD, _flat, unlink),
    Workload("write", "write 512 MiB + fsync", COLD, _tree, write),
    Workload("gcc", "gcc x 5", WARM, _tree, compile_c),
    Workload("opens", "1 000 parallel opens", COLD, _tree, open_in_parallel),
    Workload("walk-cold", "walk of 100 000 files", COLD, _wide, walk),
    Workload("walk-warm", "walk of 100 000 files", WARM, _wide, walk),
    Workload("copyup", "copy-up of 1 GiB + fsync", PAGES, _large, copy_up, preread="copyup"),
    Workload(
        "mount", "mount to first ls, 100 layers", COLD, _layers, mount_and_list, mounts_itself=True
    ),
    Workload("random-read", "5 000 random 4 KiB reads", DISK, _large, read_at_random),
    Workload("memory", "server RSS, 100 000 files", COLD, _wide, memory, unit="MiB"),
)
