"""Everything a user can see of a tree, as plain data that two trees can be compared by.

Owns `Entry` and the walk. Its one rule: no name is ever decoded and no path is ever resolved twice;
every step is relative to the descriptor of the directory above, so names may be any 255 bytes and
trees may be deeper than PATH_MAX. Knows nothing of union file systems.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
PHANTOM = "phantom"
READ_BYTES = 1 << 20
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One path of a dumped tree; what was not asked for, or has no meaning here, is None."""

    kind: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    nlink: int | None = None
    size: int | None = None
    rdev: int | None = None
    mtime_ns: int | None = None
    atime_ns: int | None = None
    ino: int | None = None
    target: bytes | None = None
    sha256: str | None = None
    xattrs: tuple[tuple[str, bytes], ...] | None = None
    links: tuple[bytes, ...] = ()
    """All paths of the tree that share this inode, sorted; empty when there is only this one."""
    listed_ino_differs: bool = False
    """The directory listing gave another inode number or type than stat (only with `ino`)."""


Dump = dict[bytes, Entry]


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What a walk collects beside the fields that cost nothing."""

    ino: bool
    atime: bool
    nlink: bool
    contents: bool
    xattrs: bool


def dump_tree(
    root: bytes | str | Path,
    *,
    ino: bool = False,
    atime: bool = False,
    nlink: bool = True,
    contents: bool = True,
    xattrs: bool = True,
) -> Dump:
    """Describe every path below `root` (and `root` itself, as b"").

    A name that the directory lists but that cannot be looked up is an `Entry` of kind PHANTOM.
    Directories have no size: it would only say how the host stores them.
    """
    wanted = Wanted(ino=ino, atime=atime, nlink=nlink, contents=contents, xattrs=xattrs)
    root_fd = os.open(os.fsencode(root), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = dict(_walk(root_fd, b"", wanted))
    finally:
        os.close(root_fd)
    by_inode: dict[tuple[int, int], list[bytes]] = {}
    for path, (status, _) in found.items():
        if status is not None and not stat.S_ISDIR(status.st_mode):
            by_inode.setdefault((status.st_dev, status.st_ino), []).append(path)
    dump = {path: entry for path, (_, entry) in sorted(found.items())}
    for paths in by_inode.values():
        if len(paths) > 1:
            group = tuple(sorted(paths))
            for path in paths:
                dump[path] = dataclasses.replace(dump[path], links=group)
    return dump


def diff_dumps(a: Dump, b: Dump, *, ignore: Collection[str] = ()) -> list[str]:
    """Say, a line per path, how `b` differs from `a`; `ignore` names fields of `Entry`."""
    lines = []
    for path in sorted(a.keys() | b.keys()):
        if path not in b:
            lines.append(f"{path!r}: only in the first ({a[path].kind})")
        elif path not in a:
            lines.append(f"{path!r}: only in the second ({b[path].kind})")
        else:
            changes = [
                f"{name} {_shown(getattr(a[path], name))} -> {_shown(getattr(b[path], name))}"
                for name in (field.name for field in dataclasses.fields(Entry))
                if name not in ignore and getattr(a[path], name) != getattr(b[path], name)
            ]
            if changes:
                lines.append(f"{path!r}: {', '.join(changes)}")
    return lines


def _shown(value: object) -> str:
    return oct(value) if isinstance(value, int) and 0o1000 < value < 0o200000 else repr(value)


Found = tuple[bytes, tuple[os.stat_result | None, Entry]]


def _walk(dir_fd: int, path: bytes, wanted: Wanted) -> Iterator[Found]:
    status = os.fstat(dir_fd)
    xattrs = _xattrs(dir_fd) if wanted.xattrs else None
    yield path, (status, _entry(status, wanted, xattrs=xattrs))
    with os.scandir(dir_fd) as listing:
        listed = sorted((os.fsencode(item.name), item) for item in listing)
    for name, item in listed:
        child = path + b"/" + name if path else name
        try:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            yield child, (None, Entry(PHANTOM))
            continue
        differs = wanted.ino and (
            item.inode() != status.st_ino or item.is_dir(follow_symlinks=False) != _is_dir(status)
        )
        if _is_dir(status):
            child_fd = os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
            try:
                below = _walk(child_fd, child, wanted)
                path_of_child, (status_of_child, entry) = next(below)
                entry = dataclasses.replace(entry, listed_ino_differs=differs)
                yield path_of_child, (status_of_child, entry)
                yield from below
            finally:
                os.close(child_fd)
        else:
            yield child, (status, _leaf(dir_fd, name, status, wanted, differs=differs))


def _is_dir(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode)


def _leaf(
    dir_fd: int, name: bytes, status: os.stat_result, wanted: Wanted, *, differs: bool
) -> Entry:
    mode = status.st_mode
    # A path through /proc reaches a name below a descriptor for the calls that take no dir_fd.
    through_proc = b"/proc/self/fd/%d/%s" % (dir_fd, name)
    return _entry(
        status,
        wanted,
        target=os.readlink(name, dir_fd=dir_fd) if stat.S_ISLNK(mode) else None,
        sha256=_sha256(dir_fd, name) if wanted.contents and stat.S_ISREG(mode) else None,
        xattrs=_xattrs(through_proc) if wanted.xattrs else None,
        differs=differs,
    )


def _entry(
    status: os.stat_result,
    wanted: Wanted,
    *,
    target: bytes | None = None,
    sha256: str | None = None,
    xattrs: tuple[tuple[str, bytes], ...] | None = None,
    differs: bool = False,
) -> Entry:
    mode = status.st_mode
    return Entry(
        kind=KINDS[stat.S_IFMT(mode)],
        mode=stat.S_IMODE(mode),
        uid=status.st_uid,
        gid=status.st_gid,
        nlink=status.st_nlink if wanted.nlink else None,
        size=None if stat.S_ISDIR(mode) else status.st_size,
        rdev=status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None,
        mtime_ns=status.st_mtime_ns,
        atime_ns=status.st_atime_ns if wanted.atime else None,
        ino=status.st_ino if wanted.ino else None,
        target=target,
        sha256=sha256,
        xattrs=xattrs,
        listed_ino_differs=differs,
    )


def _sha256(dir_fd: int, name: bytes) -> str:
    digest = hashlib.sha256()
    fd = os.open(name, FILE_FLAGS, dir_fd=dir_fd)
    try:
        while block := os.read(fd, READ_BYTES):
            digest.update(block)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _xattrs(target: int | bytes) -> tuple[tuple[str, bytes], ...]:
    if isinstance(target, int):
        return tuple((name, os.getxattr(target, name)) for name in sorted(os.listxattr(target)))
    names = sorted(os.listxattr(target, follow_symlinks=False))
    return tuple((name, os.getxattr(target, name, follow_symlinks=False)) for name in names)
