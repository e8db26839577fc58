"""Whiteout, opaque, redirect, metacopy, origin: their spellings, read in every dialect, written in one.

The one rule: a marker that can only hide something is read in every dialect; one that can show something
(redirect, metacopy) is read only in the dialect of the mount, since a `user.` attribute can be set by anybody.

Sources: Linux Documentation/filesystems/overlayfs.rst; fs/overlayfs/overlayfs.h (names and values of the
attributes); aufs(5) for `.wh.`; fuse-overlayfs(1) for `user.fuseoverlayfs.`.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass

AUFS_PREFIX = b".wh."
AUFS_OPAQUE = b".wh..wh..opq"
FUSE_OVERLAYFS_PREFIX = b"user.fuseoverlayfs."
FUSE_OVERLAYFS_OPAQUE = "user.fuseoverlayfs.opaque"
TRUSTED_PREFIX = b"trusted.overlay."
USER_PREFIX = b"user.overlay."
WHITEOUT_DEVICE = 0  # makedev(0, 0)
_PREFIXES = (TRUSTED_PREFIX, USER_PREFIX, FUSE_OVERLAYFS_PREFIX)
_ESCAPE = b"overlay."

_ORIGIN = struct.Struct("<QII")  # inode number shown, version, flags
_ORIGIN_VERSION = 1

NO_XATTR = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES})


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an upper layer spells its markers.

    Attributes:
        prefix: `trusted.overlay.` where allowed, `user.overlay.` in a user namespace.
        xattrs: Markers can be extended attributes at all; without, only `.wh.` files are written.
        devices: Whiteouts are character devices 0:0; without, `.wh.NAME` files.
    """

    prefix: bytes = TRUSTED_PREFIX
    xattrs: bool = True
    devices: bool = True

    def name(self, marker: str) -> str:
        """The full attribute name of `marker`, for instance "opaque"."""
        return self.prefix.decode() + marker


def is_whiteout_stat(st: os.stat_result) -> bool:
    """Whether an object is overlayfs's whiteout, a character device 0:0."""
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == WHITEOUT_DEVICE


def is_marker_name(name: bytes) -> bool:
    """Whether a directory entry is a marker of AUFS and so never shown."""
    return name.startswith(AUFS_PREFIX)


@dataclass(frozen=True, slots=True)
class DirectoryMarks:
    """The markers on one directory of one layer.

    Attributes:
        opaque: Nothing further down shows through it.
        whiteout_files: It may hold whiteouts spelt as regular files with an attribute (opaque = x).
        redirect: Where its lower directories are: an absolute path or a bare name; None for the same name.
        impure: It may hold entries that were copied up.
    """

    opaque: bool = False
    whiteout_files: bool = False
    redirect: bytes | None = None
    impure: bool = False


NO_MARKS = DirectoryMarks()


def directory_marks(path: bytes | int, dialect: Dialect) -> DirectoryMarks:
    """Read the markers on a directory, given by descriptor or path (whose last part is not followed).

    Raises:
        OSError: The layer could not be read (EIO, ENOENT ...).
    """
    names = list_xattrs(path)
    if not names:
        return NO_MARKS
    opaque = whiteout_files = impure = False
    redirect: bytes | None = None
    own = dialect.prefix.decode()
    for name in names:
        if name in _OPAQUE_NAMES:
            value = get_xattr(path, name)
            opaque = opaque or value == b"y"
            whiteout_files = whiteout_files or value == b"x"
        elif name == own + "redirect":
            redirect = get_xattr(path, name)
        elif name == own + "impure":
            impure = True
    return DirectoryMarks(opaque, whiteout_files, redirect, impure)


_OPAQUE_NAMES = frozenset({"trusted.overlay.opaque", "user.overlay.opaque", FUSE_OVERLAYFS_OPAQUE})


def list_xattrs(path: bytes | int) -> list[str]:
    """Names of the attributes of a file; empty where the file system has none.

    Raises:
        OSError: The file could not be read.
    """
    try:
        return os.listxattr(path, follow_symlinks=isinstance(path, int))
    except OSError as error:
        if error.errno in NO_XATTR:
            return []
        raise


def get_xattr(path: bytes | int, name: str) -> bytes | None:
    """Value of one attribute; None when it is not there or not for us.

    Raises:
        OSError: The file could not be read.
    """
    try:
        return os.getxattr(path, name, follow_symlinks=isinstance(path, int))
    except OSError as error:
        if error.errno in NO_XATTR:
            return None
        raise


def hides_beneath_xattr(path: bytes) -> bool:
    """Whether a regular file of size 0 is a whiteout spelt as an attribute (in a directory with opaque = x)."""
    return any(
        get_xattr(path, prefix.decode() + "whiteout") is not None
        for prefix in (TRUSTED_PREFIX, USER_PREFIX)
    )


def pack_origin(ino: int) -> bytes:
    """The value of the `mica.origin` attribute: the inode number that a copied-up file goes on showing."""
    return _ORIGIN.pack(ino, _ORIGIN_VERSION, 0)


def unpack_origin(value: bytes | None) -> int | None:
    """The inode number in a `mica.origin` attribute; None when it is absent or not ours to read."""
    if value is None or len(value) != _ORIGIN.size:
        return None
    ino, version, _flags = _ORIGIN.unpack(value)
    return int(ino) if version == _ORIGIN_VERSION else None


def pack_nlink(standing: int) -> bytes:
    """The `nlink` attribute of overlayfs, relative to the upper file's link count (one link is the index's)."""
    return b"U%+d" % (standing - 1)


def unpack_nlink(value: bytes | None) -> int:
    """How many names of the lower file still stand, from an `nlink` attribute; 0 when it says nothing."""
    if value is None or not value.startswith(b"U"):
        return 0
    try:
        return max(0, int(value[1:]) + 1)
    except ValueError:
        return 0


def parse_redirect(value: bytes) -> tuple[bool, list[bytes]] | None:
    """Split a `redirect` attribute into (absolute, components); None when it is malformed or points outside."""
    absolute = value.startswith(b"/")
    parts = value[1:].split(b"/") if absolute else [value]
    if not value or len(value) > 4096:
        return None
    if any(part in {b"", b".", b".."} or b"/" in part or b"\0" in part for part in parts):
        return None
    return absolute, parts


def is_private_xattr(name: bytes) -> bool:
    """Whether an attribute on disk is a marker, never shown to the mount's users."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return not name.startswith(prefix + _ESCAPE)
    return False


def to_disk_xattr(name: bytes) -> bytes:
    """The name under which a user's attribute is kept: its own, or escaped when it would read as a marker."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return prefix + _ESCAPE + name[len(prefix) :]
    return name


def from_disk_xattr(name: bytes) -> bytes | None:
    """The name that users see for an attribute on disk; None for a marker."""
    if is_private_xattr(name):
        return None
    for prefix in _PREFIXES:
        if name.startswith(prefix + _ESCAPE):
            return prefix + name[len(prefix) + len(_ESCAPE) :]
    return name
