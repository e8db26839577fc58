"""The same layers, mounted by two implementations, and the same calls made on both.

The parts, from the bottom up: `Node` (an object of a layer, built directly on disk), `Side` (the
layers in one place, and who mounts them), `Op` (one system call as plain data), `Actor` (a process
with a user's credentials that makes the calls) and `settled` (a dump without what may differ).

Its one rule: nothing here asserts. The tests say what must be equal. A call never blocks the caller
for ever: an actor that does not answer raises `NoAnswerError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tests.support.dump import Dump, Entry, dump_tree
from unionfs import client

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100  # linux/fcntl.h
RENAME_NOREPLACE = 1  # linux/fs.h
RENAME_EXCHANGE = 2
MNT_DETACH = 2  # linux/fs.h
KERNEL_OPTIONS = "redirect_dir=on,metacopy=on,index=on,xino=on"
KERNEL_FOREIGN_OPTIONS = "redirect_dir=on,metacopy=on,index=off"
"""For an upper that another implementation wrote: it has no index directory of overlayfs's."""
ANSWER_TIMEOUT_S = 30.0
BUSY_TIMEOUT_S = 20.0
"""A mount namespace that somebody made meanwhile holds a copy of the last mount, and its upper."""
GROUPS = {0: (0,), 1000: (1000, 100), 1001: (1001, 100)}
OLD_NS = 1_000_000_000 * 10**9
"""2001: every time that a test sets lies before, every time that a clock gives lies after."""


# --- layers -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One object of a layer. `data` is a file's contents, a symlink's or a hard link's target."""

    kind: str
    path: bytes
    mode: int = 0o755
    owner: int = 0
    data: bytes = b""
    xattrs: tuple[tuple[str, bytes], ...] = ()
    mtime_s: int = 10_000_000
    opaque: bool = False


Layer = Sequence[Node]
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ELOOP)


def build_layer(root: Path, layer: Layer) -> None:
    """Make the objects of one layer on disk, leaving out those that find no room."""
    os.mkdir(root, 0o755)
    base = os.fsencode(root)
    made = [node for node in layer if _build_node(base, node)]
    for node in reversed(made):
        if node.kind != "whiteout":
            os.utime(base + b"/" + node.path, ns=(node.mtime_s * 10**9,) * 2, follow_symlinks=False)
    for path, directories, _ in os.walk(base, topdown=False):
        for name in (os.path.join(path, directory) for directory in directories):
            if os.lstat(name).st_mtime_ns > OLD_NS:
                os.utime(name, (5_000_000, 5_000_000))
    os.chmod(root, 0o777)
    os.utime(root, (5_000_000, 5_000_000))


def _build_node(base: bytes, node: Node) -> bool:
    path = base + b"/" + node.path
    if os.path.realpath(os.path.dirname(path)) != os.path.dirname(path):
        return False
    try:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        _create_node(base, path, node)
    except OSError as error:
        if error.errno not in IN_THE_WAY:
            raise
        return False
    if node.kind not in ("whiteout", "link"):
        os.chown(path, node.owner, node.owner, follow_symlinks=False)
    if node.kind not in ("whiteout", "link", "symlink"):
        os.chmod(path, node.mode)
    if node.kind in ("file", "directory"):
        for name, value in node.xattrs:
            os.setxattr(path, name, value)
    if node.kind == "directory" and node.opaque:
        os.setxattr(path, "trusted.overlay.opaque", b"y")
    return True


def _create_node(base: bytes, path: bytes, node: Node) -> None:
    match node.kind:
        case "directory":
            os.mkdir(path)
        case "file":
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            os.write(fd, node.data)
            os.close(fd)
        case "symlink":
            os.symlink(node.data, path)
        case "link":
            source = base + b"/" + node.data
            if not stat.S_ISREG(os.lstat(source).st_mode):
                raise FileNotFoundError(errno.ENOENT, "no regular file", source)
            os.link(source, path)
        case "fifo":
            os.mkfifo(path)
        case "device":
            os.mknod(path, stat.S_IFCHR, os.makedev(1, 3))
        case "whiteout":
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        case _:
            raise ValueError(node.kind)


EXAMPLE_LAYERS = (
    (
        Node("directory", b"dir", 0o750, 1000),
        Node("file", b"dir/over", 0o640, 1000, b"upper of the lowers\n"),
    ),
    (
        Node("directory", b"dir", 0o755),
        Node("file", b"dir/over", 0o600, 0, b"hidden\n"),
        Node("file", b"dir/under", 0o600, 1001, b"from below\n", (("user.mica", b"1"),)),
        Node("directory", b"dir/sub", 0o700),
        Node("file", b"dir/sub/leaf", 0o644, 0, b"leaf\n"),
        Node("directory", b"empty", 0o755),
        Node("file", b"large", 0o644, 0, b"d" * 300_000),
        Node("file", b"one", 0o644, 0, b"linked\n"),
        Node("link", b"two", data=b"one"),
        Node("link", b"dir/three", data=b"one"),
        Node("symlink", b"pointer", data=b"dir/under"),
        Node("fifo", b"pipe", 0o622),
        Node("device", b"null", 0o666),
    ),
)
"""Two lowers with something of everything, for scripts that are written by hand."""


# --- the two sides ------------------------------------------------------------------------------


class Side:
    """One set of layers on disk and the implementation that mounts it."""

    name: str

    def __init__(self, base: Path, layers: Sequence[Layer]) -> None:
        base.mkdir(mode=0o755)
        self.base = base
        self.lowers = [base / f"lower{number}" for number in range(len(layers))]
        self.upper, self.work, self.merged = base / "upper", base / "work", base / "merged"
        for root, layer in zip(self.lowers, layers, strict=True):
            build_layer(root, layer)
        for directory in (self.upper, self.work, self.merged):
            directory.mkdir()
        self.upper.chmod(0o777)
        os.utime(self.upper, (5_000_000, 5_000_000))

    def mount(self) -> None:
        raise NotImplementedError

    def unmount(self) -> None:
        raise NotImplementedError

    def fresh_work(self) -> None:
        """Empty the work directory, which belongs to one implementation; the upper does not."""
        shutil.rmtree(self.work)
        self.work.mkdir()


class KernelSide(Side):
    """Overlayfs of the running kernel."""

    name = "overlayfs"
    options = KERNEL_OPTIONS

    def mount(self) -> None:
        layers = f"lowerdir={':'.join(map(str, self.lowers))},upperdir={self.upper}"
        data = f"{layers},workdir={self.work},{self.options}"
        deadline_s = time.monotonic() + BUSY_TIMEOUT_S
        while libc.mount(b"overlay", bytes(self.merged), b"overlay", 0, data.encode()) < 0:
            number = ctypes.get_errno()
            if number != errno.EBUSY or time.monotonic() > deadline_s:
                raise OSError(number, f"cannot mount overlayfs: {data}")
            time.sleep(0.05)

    def unmount(self) -> None:
        if libc.umount2(bytes(self.merged), 0) < 0:
            raise OSError(ctypes.get_errno(), "cannot unmount overlayfs", str(self.merged))


class ComplaintError(Exception):
    """What a server wrote to its log about a bug of its own."""


class MicaSide(Side):
    """mica, by its own client."""

    name = "mica"
    options: tuple[str, ...] = ("dev", "suid")  # as overlayfs mounts by default
    env: dict[str, str] | None = None
    mounted: client.Mount | None = None

    def mount(self) -> None:
        self.mounted = client.mount(
            self.merged,
            lower=self.lowers,
            upper=self.upper,
            work=self.work,
            options=self.options,
            env=self.env,
        )

    def unmount(self) -> None:
        if self.mounted is not None:
            self.mounted.unmount()
            self._read_log(self.mounted)

    def kill(self) -> None:
        """End the server as a crash would."""
        if self.mounted is not None:
            self.mounted.kill()
            self._read_log(self.mounted)

    def _read_log(self, mounted: client.Mount) -> None:
        self.mounted = None
        log = mounted.log()
        if "Traceback" in log or "ERROR" in log:
            raise ComplaintError(log)


def swapped(side: Side, other: type[Side]) -> Side:
    """The same layers and upper in the hands of `other`, with an empty work directory."""
    twin = other.__new__(other)
    for attribute in ("base", "lowers", "upper", "work", "merged"):
        setattr(twin, attribute, getattr(side, attribute))
    if isinstance(twin, KernelSide):
        twin.options = KERNEL_FOREIGN_OPTIONS
    twin.fresh_work()
    return twin


def let_go(*sides: Side) -> None:
    """Unmount what a failed test left mounted, by path, and end its servers."""
    for side in sides:
        if isinstance(side, MicaSide):
            with contextlib.suppress(OSError, client.MountError, ComplaintError):
                side.kill()
        if os.path.ismount(side.merged):
            libc.umount2(bytes(side.merged), MNT_DETACH)


# --- operations ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """One call by one user; its repr is Python, to be pasted from a failure into a test."""

    verb: str
    args: tuple[Any, ...] = ()
    uid: int = 0

    def __repr__(self) -> str:
        return f"Op({self.verb!r}, {self.args!r}, uid={self.uid})"


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a call gave: a value, or the name of an errno."""

    value: object = None
    error: str | None = None

    def __repr__(self) -> str:
        return self.error or repr(self.value)


Handles = dict[tuple[bytes, int], int]


class Calls:
    """The verbs, as methods, over one mounted tree. A path argument is relative to its root."""

    def __init__(self, root: bytes, handles: Handles) -> None:
        self.root = root
        self.handles = handles

    def perform(self, op: Op) -> Outcome:
        try:
            return Outcome(getattr(self, "do_" + op.verb)(*op.args))
        except OSError as error:
            return Outcome(error=errno.errorcode.get(error.errno or 0, str(error)))
        finally:
            os.umask(0)

    def _at(self, path: bytes) -> bytes:
        return self.root + b"/" + path

    # files and their contents

    def do_open(self, path: bytes, flags: int, mode: int, umask: int) -> None:
        os.umask(umask)
        os.close(os.open(self._at(path), flags | os.O_NONBLOCK, mode))

    def do_hold(self, handle: int, path: bytes, flags: int) -> None:
        """Open and keep open under a number."""
        fd = os.open(self._at(path), flags | os.O_NONBLOCK, 0o644)
        self.do_release(handle)
        self.handles[self.root, handle] = fd

    def do_release(self, handle: int) -> None:
        fd = self.handles.pop((self.root, handle), None)
        if fd is not None:
            os.close(fd)

    def _held(self, handle: int) -> int:
        return self.handles.get((self.root, handle), -1)

    def do_hread(self, handle: int, size: int, offset: int) -> bytes:
        return os.pread(self._held(handle), size, offset)

    def do_hwrite(self, handle: int, data: bytes, offset: int) -> int:
        return os.pwrite(self._held(handle), data, offset)

    def do_htruncate(self, handle: int, size: int) -> None:
        os.ftruncate(self._held(handle), size)

    def do_hchmod(self, handle: int, mode: int) -> None:
        os.fchmod(self._held(handle), mode)

    def do_hstat(self, handle: int) -> tuple[object, ...]:
        return _facts(os.fstat(self._held(handle)))

    def do_read(self, path: bytes) -> bytes:
        fd = os.open(self._at(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, 1 << 16)
        finally:
            os.close(fd)

    def do_write(self, path: bytes, flags: int, data: bytes, offset: int | None) -> int:
        fd = os.open(self._at(path), os.O_WRONLY | os.O_NONBLOCK | flags, 0o644)
        try:
            return os.write(fd, data) if offset is None else os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    def do_truncate(self, path: bytes, size: int) -> None:
        os.truncate(self._at(path), size)

    # names

    def do_mkdir(self, path: bytes, mode: int, umask: int) -> None:
        os.umask(umask)
        os.mkdir(self._at(path), mode)

    def do_mknod(self, path: bytes, mode: int, device: int, umask: int) -> None:
        os.umask(umask)
        os.mknod(self._at(path), mode, device)

    def do_symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, self._at(path))

    def do_link(self, source: bytes, path: bytes, follow: bool = False) -> None:
        os.link(self._at(source), self._at(path), follow_symlinks=follow)

    def do_unlink(self, path: bytes) -> None:
        os.unlink(self._at(path))

    def do_rmdir(self, path: bytes) -> None:
        os.rmdir(self._at(path))

    def do_rename(self, old: bytes, new: bytes, flags: int) -> None:
        if libc.renameat2(AT_FDCWD, self._at(old), AT_FDCWD, self._at(new), flags) < 0:
            raise OSError(ctypes.get_errno(), "renameat2")

    # attributes

    def do_chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def do_chown(self, path: bytes, uid: int, gid: int, follow: bool = True) -> None:
        os.chown(self._at(path), uid, gid, follow_symlinks=follow)

    def do_utimens(self, path: bytes, times: tuple[int, int], follow: bool = True) -> object:
        os.utime(self._at(path), ns=times, follow_symlinks=follow)
        status = os.stat(self._at(path), follow_symlinks=follow)
        return status.st_atime_ns, status.st_mtime_ns

    def do_touch(self, path: bytes) -> None:
        os.utime(self._at(path))

    def do_setxattr(
        self, path: bytes, name: str, value: bytes, flags: int, follow: bool = True
    ) -> None:
        os.setxattr(self._at(path), name, value, flags, follow_symlinks=follow)

    def do_getxattr(self, path: bytes, name: str, follow: bool = True) -> bytes:
        return os.getxattr(self._at(path), name, follow_symlinks=follow)

    def do_listxattr(self, path: bytes, follow: bool = True) -> list[str]:
        return sorted(os.listxattr(self._at(path), follow_symlinks=follow))

    def do_removexattr(self, path: bytes, name: str, follow: bool = True) -> None:
        os.removexattr(self._at(path), name, follow_symlinks=follow)

    # questions

    def do_stat(self, path: bytes, follow: bool = True) -> tuple[object, ...]:
        return _facts(os.stat(self._at(path), follow_symlinks=follow))

    def do_access(self, path: bytes, mode: int) -> bool:
        return os.access(self._at(path), mode, effective_ids=True)

    def do_listdir(self, path: bytes) -> list[bytes]:
        return sorted(os.listdir(self._at(path)))

    def do_namemax(self) -> int:
        return os.statvfs(self.root).f_namemax

    # the test's own

    def do_snapshot(self) -> Dump:
        """Names, attributes and inode numbers, without contents: cheap enough for every step."""
        return dump_tree(self.root, ino=True, contents=False, xattrs=False)

    def do_dump(self) -> Dump:
        return dump_tree(self.root)

    def do_release_all(self) -> None:
        for key in [key for key in self.handles if key[0] == self.root]:
            os.close(self.handles.pop(key))


def _facts(status: os.stat_result) -> tuple[object, ...]:
    is_dir = stat.S_ISDIR(status.st_mode)
    return (
        oct(status.st_mode),
        status.st_uid,
        status.st_gid,
        None if is_dir else (status.st_nlink, status.st_size),
    )


# --- users --------------------------------------------------------------------------------------


class NoAnswerError(Exception):
    """A call did not come back: the server, or the kernel waiting for it, hangs."""

    def __init__(self, op: Op) -> None:
        super().__init__(f"no answer to {op!r} within {ANSWER_TIMEOUT_S:.0f} s")


class Actor:
    """A forked process with the credentials of `uid` that makes calls for the test."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self._pipe, theirs = multiprocessing.Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._pipe.close()
            _serve(uid, theirs)
        theirs.close()

    def start(self, root: Path, op: Op) -> None:
        """Ask for a call; its outcome comes by `finish`."""
        self._pipe.send((bytes(root), op))

    def finish(self, op: Op) -> Outcome:
        if not self._pipe.poll(ANSWER_TIMEOUT_S):
            raise NoAnswerError(op)
        answer = self._pipe.recv()
        if isinstance(answer, Outcome):
            return answer
        raise AssertionError(answer)

    def call(self, root: Path, op: Op) -> Outcome:
        self.start(root, op)
        return self.finish(op)

    def end(self) -> None:
        """Kill the process and reap it."""
        self._pipe.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _serve(uid: int, pipe: Connection) -> None:
    """The life of an actor; never returns."""
    try:
        os.chdir("/")
        os.setgroups(GROUPS[uid])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        handles: Handles = {}
        while True:
            root, op = pipe.recv()
            try:
                pipe.send(Calls(root, handles).perform(op))
            except Exception as error:  # noqa: BLE001  (a bug of the test must reach its parent)
                pipe.send(f"{op!r}: {error!r}")
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)


class Cast:
    """One actor per user, each forked when it is first needed."""

    def __init__(self) -> None:
        self._actors: dict[int, Actor] = {}

    def __enter__(self) -> Cast:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            actor.end()
        self._actors.clear()

    def actor(self, uid: int) -> Actor:
        if uid not in self._actors:
            self._actors[uid] = Actor(uid)
        return self._actors[uid]

    def call(self, side: Side, op: Op) -> Outcome:
        return self.actor(op.uid).call(side.merged, op)

    def dump(self, side: Side, verb: str = "dump") -> Dump:
        outcome = self.call(side, Op(verb))
        if not isinstance(outcome.value, dict):
            raise OSError(f"{verb} of {side.name} failed: {outcome}")
        return outcome.value

    def release(self, side: Side) -> None:
        """Close what the actors hold open below a side, so that it can be unmounted."""
        for actor in self._actors.values():
            actor.call(side.merged, Op("release_all"))


# --- comparing ----------------------------------------------------------------------------------

ALLOWED_FIELDS: dict[tuple[str, str], str] = {
    ("directory", "nlink"): "overlayfs says 1 for a merged directory, other file systems count",
    ("file", "mtime_ns"): (
        "overlayfs dates a metadata-only copy anew when it is opened for writing and gets its data;"
        " an open changes no time on other file systems"
    ),
    ("any", "atime_ns"): "overlayfs does not update it on lowers, FUSE leaves it to the server",
    ("any", "ino"): "each side has numbers of its own; they are compared with themselves over time",
}
"""What may differ between overlayfs and mica: (kind, field) -> why."""

ALLOWED_OUTCOMES: dict[tuple[str, str | None, str | None], str] = {
    ("removexattr", "ENODATA", None): (
        "an ACL that is not there: overlayfs fails for a file of a lower layer and succeeds for one"
        " of the upper; mica succeeds for both, as ext4 does"
    ),
}
"""Calls that may fail differently: (verb, overlayfs's errno, mica's errno) -> why."""

NOT_TRIED: dict[str, str] = {
    "names that begin with .wh.": "mica reads AUFS's markers in every layer, so it refuses them",
    "O_TMPFILE, fallocate, SEEK_HOLE": "pyfuse3 has no handler for them (README, limits)",
    "user.overlay.* under the other implementation": (
        "mica reads markers that hide in every dialect, so it escapes a user's own user.overlay."
        " names; overlayfs with trusted. markers stores them as they are"
    ),
    "times that a clock gave": "no two calls happen at the same time: after 2001 is 'now'",
}
"""What the operations leave out, and why."""


def settled(dump: Dump, *, phantoms: bool = True) -> Dump:
    """A dump without what may differ between two implementations.

    Args:
        phantoms: Keep names that are listed but cannot be looked up. Overlayfs lists whiteouts of
            a lower directory that it has nothing to merge with; no other side may.
    """
    return {
        path: _settled_entry(entry)
        for path, entry in dump.items()
        if phantoms or entry.kind != "phantom"
    }


def _settled_entry(entry: Entry) -> Entry:
    is_dir = entry.kind == "directory"
    mtime_ns = entry.mtime_ns
    return dataclasses.replace(
        entry,
        nlink=None if is_dir else entry.nlink,
        mtime_ns=mtime_ns if mtime_ns is not None and mtime_ns < OLD_NS else OLD_NS,
        atime_ns=None,
        ino=None,
    )


def exchangeable(own: Dump, foreign: Dump, upper: Path) -> tuple[Dump, Dump]:
    """Both dumps settled, without what an upper alone cannot carry to another implementation.

    Which lower names are links to a file that was copied up is kept in an index in the work
    directory, each implementation's own. Without it the names that are still only lower show the
    lower file again, and the index's own link may count as one more.

    Args:
        own: The tree as the implementation showed it that wrote `upper`.
        foreign: The same tree as the other one shows it.
    """
    torn = {path for path, entry in own.items() if _is_torn(entry, upper)}
    return _without(own, torn), _without(foreign, torn)


def _is_torn(entry: Entry, upper: Path) -> bool:
    in_upper = [os.path.lexists(os.path.join(bytes(upper), link)) for link in entry.links]
    return any(in_upper) and not all(in_upper)


def _without(dump: Dump, paths: set[bytes]) -> Dump:
    return {
        path: dataclasses.replace(entry, nlink=None, xattrs=_own_xattrs(entry))
        for path, entry in settled(dump, phantoms=False).items()
        if path not in paths
    }


def _own_xattrs(entry: Entry) -> tuple[tuple[str, bytes], ...]:
    """What both store under the same name (see NOT_TRIED)."""
    return tuple(pair for pair in entry.xattrs or () if not pair[0].startswith("user.overlay."))


def steady_numbers(before: Dump, after: Dump, moved: Callable[[bytes], bytes | None]) -> list[str]:
    """Say which paths changed their inode number although they name the same object.

    Args:
        moved: Where the object of a path is afterwards; None when it may be another one.
    """
    faults = []
    for path, entry in before.items():
        now = moved(path)
        if now is None or now not in after:
            continue
        if after[now].kind == entry.kind and after[now].ino != entry.ino:
            faults.append(f"{path!r} -> {now!r}: st_ino {entry.ino} -> {after[now].ino}")
    faults += [
        f"{path!r}: readdir and stat differ" for path in after if after[path].listed_ino_differs
    ]
    return faults
