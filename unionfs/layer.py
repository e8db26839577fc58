"""One sheet of the stack: a read-only layer, and the directories (sheets) in it.

`Sheet` is what the tree needs to know of one directory of one layer; `DirectorySheet` implements it for a directory
on disk.  The one rule: every access is relative to a directory descriptor and never follows a symbolic link, so
nothing in a layer, however hostile, leads outside it.

Threading: the descriptors of sheets belong to the event loop; a raw descriptor is used within one request and never
kept across an await (`FdCache.trim` may close it between requests).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from unionfs import faults, markers, syscalls
from unionfs.errors import SetupError
from unionfs.resolve import ABSENT, DIRECTORY, FILE, METACOPY, OPAQUE, WHITEOUT, Fact, Kind

_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DIR_PATH_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})


@dataclass(frozen=True, slots=True)
class Hit:
    """What one sheet has under one name, with all that the tree needs of it.

    Attributes:
        fact: For the union rule.
        st: Its metadata; None when it is absent or only hides.
        sheet: For a directory, its own sheet.
        redirect: Where to look further down, (absolute, components); None for the same name.
    """

    fact: Fact
    st: os.stat_result | None = None
    sheet: Sheet | None = None
    redirect: tuple[bool, list[bytes]] | None = None


ABSENT_HIT = Hit(ABSENT)
WHITEOUT_HIT = Hit(WHITEOUT)


if TYPE_CHECKING:
    from collections.abc import Callable

    from unionfs.markers import Dialect, DirectoryMarks


class Layer(Protocol):
    """A read-only tree that takes part in a union."""

    index: int
    """Its place in the stack, 0 topmost of the lowers; -1 for the upper."""
    bottom: bool
    """No layer lies below it."""
    salt: int
    """0 where inode numbers are shown as they are; else what they are hashed with."""
    data_only: bool
    """It shows no names of its own: it only holds data for metacopies (overlayfs's `::`)."""

    @property
    def root(self) -> Sheet:
        """Its topmost directory."""

    def close(self) -> None:
        """The layer is no longer used."""


class Sheet(Protocol):
    """One directory of one layer."""

    impure: bool
    """It may hold copied-up entries, so that each has to be asked for its markers."""

    @property
    def layer(self) -> Layer:
        """The layer that it belongs to."""

    def path(self) -> bytes:
        """Absolute path inside the layer ("/" for its root)."""

    def examine(self, name: bytes, *, beneath: bool) -> Hit:
        """What is under `name`; `beneath`: other layers may show through, so markers matter."""

    def lstat(self, name: bytes) -> os.stat_result:
        """Metadata of the entry `name`, itself when it is a symbolic link."""

    def stat_self(self) -> os.stat_result:
        """Metadata of the directory."""

    def scan(self) -> tuple[list[bytes], set[bytes], set[bytes]]:
        """The names in it without markers, which of them are directories, and what it hides further down."""

    def stats(self) -> Callable[[bytes], os.stat_result]:
        """`lstat` for many entries within one request."""

    def open(self, name: bytes, flags: int) -> int:
        """Open the entry `name`; the caller owns the descriptor."""

    def readlink(self, name: bytes) -> bytes:
        """Target of the symbolic link `name`."""

    def xattr_path(self, name: bytes | None) -> bytes:
        """A path for the *xattr calls, its last part not to be followed; None for the directory itself."""


class FdCache:
    """The open directory descriptors, least recently used first out.

    Nothing is closed while a request runs; `trim` is called between requests.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._open: OrderedDict[DirectorySheet, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, sheet: DirectorySheet) -> None:
        """Take in `sheet`, whose descriptor was just opened."""
        self._open[sheet] = None

    def touch(self, sheet: DirectorySheet) -> None:
        """Note that the descriptor of `sheet` was used; one that is kept open on purpose is not in here."""
        if sheet in self._open:
            self._open.move_to_end(sheet)

    def forget(self, sheet: DirectorySheet) -> None:
        """Take `sheet` out: its owner keeps or closes its descriptor."""
        self._open.pop(sheet, None)

    def trim(self) -> None:
        """Close what is over capacity."""
        while len(self._open) > self.capacity:
            sheet, _ = self._open.popitem(last=False)
            sheet.close()


class DirectoryLayer:
    """A layer that is a directory on disk."""

    def __init__(
        self, root_fd: int, name: bytes, *, index: int, dialect: Dialect, cache: FdCache
    ) -> None:
        """Take over `root_fd`, a descriptor of the directory; `name` is for messages."""
        self.name = name
        self.index = index
        self.bottom = False
        self.dialect = dialect
        self.cache = cache
        self.device = os.fstat(root_fd).st_dev
        self.salt = 0
        self.data_only = False
        self.root = DirectorySheet(self, None, b"")
        self.root.adopt_fd(root_fd)

    def close(self) -> None:
        """Close the root, without which nothing in the layer can be opened any more."""
        self.root.close()


class DirectorySheet:
    """One directory on disk, reached from its parent's descriptor, one component at a time."""

    __slots__ = ("_fd", "_marks", "impure", "layer", "name", "parent", "whiteout_files")

    def __init__(self, layer: DirectoryLayer, parent: DirectorySheet | None, name: bytes) -> None:
        self.layer = layer
        self.parent = parent
        self.name = name
        self.whiteout_files = False
        self.impure = False
        self._fd = -1
        self._marks: DirectoryMarks | None = None

    # --- descriptors ---------------------------------------------------------------------------------------------

    def adopt_fd(self, fd: int) -> None:
        """Use `fd` from now on, whatever happens to the name (the root, or a removed directory)."""
        self.layer.cache.forget(self)
        self._fd = fd

    def pin(self) -> None:
        """Keep the descriptor until `close`: the directory is about to lose its name."""
        self.fd()
        self.layer.cache.forget(self)

    def close(self) -> None:
        """Close the descriptor; a later use opens it anew."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.layer.cache.forget(self)
            os.close(fd)

    def fd(self) -> int:
        """A descriptor of the directory, valid until the end of the request.

        Raises:
            OSError: The directory is gone, or is no directory any more.
        """
        if self._fd >= 0:
            if self.parent is not None:
                self.layer.cache.touch(self)
            return self._fd
        chain = [self]
        above = self.parent
        while above is not None and not above.is_open:
            chain.append(above)
            above = above.parent
        if above is None:
            raise OSError(errno.ESTALE, "the layer is closed", self.name)
        fd = above.fd()
        for sheet in reversed(chain):
            fd = sheet.open_in(fd)
        return fd

    @property
    def is_open(self) -> bool:
        """Whether it has a descriptor at hand."""
        return self._fd >= 0

    def open_in(self, parent_fd: int) -> int:
        """Open the directory, given a descriptor of its parent."""
        try:
            self._fd = os.open(self.name, _DIR_FLAGS, dir_fd=parent_fd)
        except PermissionError:
            self._fd = os.open(self.name, _DIR_PATH_FLAGS, dir_fd=parent_fd)
        self.layer.cache.add(self)
        return self._fd

    # --- reading -------------------------------------------------------------------------------------------------

    def path(self) -> bytes:
        """Absolute path inside the layer ("/" for its root)."""
        parts: list[bytes] = []
        sheet: DirectorySheet = self
        while sheet.parent is not None:
            parts.append(sheet.name)
            sheet = sheet.parent
        return b"/" + b"/".join(reversed(parts))

    def child(self, name: bytes) -> DirectorySheet:
        """The sheet of the subdirectory `name`, which is not looked at yet."""
        return DirectorySheet(self.layer, self, name)

    def xattr_path(self, name: bytes | None) -> bytes:
        """A path for the *xattr calls, its last part not to be followed; None for the directory itself."""
        if name is None:
            return b"/proc/self/fd/%d/." % self.fd()
        return b"/proc/self/fd/%d/%b" % (self.fd(), name)

    def marks(self) -> DirectoryMarks:
        """The markers on this directory, read once."""
        if self._marks is None:
            self._marks = markers.directory_marks(self.xattr_path(None), self.layer.dialect)
            self.whiteout_files = self._marks.whiteout_files
            self.impure = self._marks.impure
        return self._marks

    def forget_marks(self) -> None:
        """The markers have changed: read them again when asked."""
        self._marks = None

    def stat_self(self) -> os.stat_result:
        """Metadata of the directory."""
        if self._fd < 0 and self.parent is not None:
            return os.stat(self.name, dir_fd=self.parent.fd(), follow_symlinks=False)
        return os.fstat(self.fd())

    def lstat(self, name: bytes) -> os.stat_result:
        """Metadata of the entry `name`, itself when it is a symbolic link."""
        faults.point("read.lower")
        return os.stat(name, dir_fd=self.fd(), follow_symlinks=False)

    def open(self, name: bytes, flags: int) -> int:
        """Open the entry `name`; the caller owns the descriptor."""
        # A FIFO that took a file's place must not be waited for.
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=self.fd())

    def readlink(self, name: bytes) -> bytes:
        """Target of the symbolic link `name`."""
        return os.readlink(name, dir_fd=self.fd())

    def examine(self, name: bytes, *, beneath: bool) -> Hit:
        """What is under `name`; `beneath`: other layers may show through, so markers matter."""
        try:
            st = self.lstat(name)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return WHITEOUT_HIT if beneath and self.has_aufs_whiteout(name) else ABSENT_HIT
        mode = st.st_mode
        if stat.S_ISDIR(mode):
            return self._examine_directory(name, st, beneath=beneath)
        if stat.S_ISCHR(mode) and st.st_rdev == 0:
            return WHITEOUT_HIT
        if stat.S_ISREG(mode) and (self.impure or st.st_blocks * 512 < st.st_size):
            return self._examine_sparse(name, st)
        could_hide = self.whiteout_files and st.st_size == 0 and stat.S_ISREG(mode)
        if could_hide and markers.hides_beneath_xattr(self.xattr_path(name)):
            return WHITEOUT_HIT
        return Hit(FILE, st)

    def _examine_directory(self, name: bytes, st: os.stat_result, *, beneath: bool) -> Hit:
        sheet = self.child(name)
        if self.layer.bottom:
            return Hit(DIRECTORY, st, sheet)
        marks = sheet.marks()
        opaque = marks.opaque
        if not opaque and beneath:
            opaque = self.has_aufs_whiteout(name) or sheet.has_entry(markers.AUFS_OPAQUE)
        redirect = markers.parse_redirect(marks.redirect) if marks.redirect else None
        if marks.redirect and redirect is None:
            opaque = True  # malformed: nothing may be shown through it
        return Hit(OPAQUE if opaque else DIRECTORY, st, sheet, redirect)

    def _examine_sparse(self, name: bytes, st: os.stat_result) -> Hit:
        """A regular file with holes may be a metacopy: those have their size but no blocks.

        In an impure directory every file is asked: a crash may have left a metacopy with some of its data.
        """
        path = self.xattr_path(name)
        dialect = self.layer.dialect
        if self.layer.bottom or markers.get_xattr(path, dialect.name("metacopy")) is None:
            return Hit(FILE, st)
        value = markers.get_xattr(path, dialect.name("redirect"))
        return Hit(METACOPY, st, redirect=markers.parse_redirect(value) if value else None)

    def has_entry(self, name: bytes) -> bool:
        """Whether the directory has an entry `name`."""
        try:
            self.lstat(name)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        return True

    def has_aufs_whiteout(self, name: bytes) -> bool:
        """Whether `.wh.NAME` hides `name` further down."""
        return len(name) <= 251 and self.has_entry(markers.AUFS_PREFIX + name)  # 255 - len(".wh.")

    def scan(self) -> tuple[list[bytes], set[bytes], set[bytes]]:
        """The names in it without markers, which of them are directories, and what it hides further down.

        Raises:
            OSError: The directory could not be read.
        """
        faults.point("read.lower")
        names: list[bytes] = []
        directories: set[bytes] = set()
        hidden: set[bytes] = set()
        with os.scandir(b"/proc/self/fd/%d" % self.fd()) as listing:
            for entry in listing:
                name = entry.name
                if name.startswith(markers.AUFS_PREFIX):
                    hidden.add(name[len(markers.AUFS_PREFIX) :])
                    continue
                if entry.is_dir(follow_symlinks=False):
                    directories.add(name)
                elif self._hides(entry):
                    hidden.add(name)
                    continue
                names.append(name)
        return names, directories, hidden

    def _hides(self, entry: os.DirEntry[bytes]) -> bool:
        """Whether an entry that is no directory is a whiteout."""
        if entry.is_file(follow_symlinks=False):
            return self.whiteout_files and self._is_whiteout_file(entry.name)
        return not entry.is_symlink() and self._is_whiteout_device(entry.name)

    def stats(self) -> Callable[[bytes], os.stat_result]:
        """`lstat` for many entries within one request."""
        return functools.partial(os.stat, dir_fd=self.fd(), follow_symlinks=False)

    def _is_whiteout_file(self, name: bytes) -> bool:
        st = self.lstat(name)
        return st.st_size == 0 and markers.hides_beneath_xattr(self.xattr_path(name))

    def _is_whiteout_device(self, name: bytes) -> bool:
        return markers.is_whiteout_stat(self.lstat(name))


@dataclass(frozen=True, slots=True)
class Walked:
    """Where an absolute redirect leads in one layer.

    Attributes:
        sheet: The directory that holds the last component; None when this layer has none there.
        closed: What this layer has on the way hides the path in the layers below.
        components: The path to follow in the layers below (redirects on the way change it).
    """

    sheet: Sheet | None
    closed: bool
    components: list[bytes]


def walk(layer: Layer, components: list[bytes]) -> Walked:
    """Follow an absolute redirect down one layer to the directory above its last component."""
    sheet = layer.root
    closed = False
    below = components
    for depth, name in enumerate(components[:-1]):
        hit = sheet.examine(name, beneath=True)
        if hit.sheet is None:
            return Walked(None, closed or hit.fact.kind is not Kind.ABSENT, below)
        closed = closed or hit.fact.closes
        if hit.redirect is not None:
            absolute, parts = hit.redirect
            rest = components[depth + 1 :]
            below = parts + rest if absolute else components[:depth] + parts + rest
        sheet = hit.sheet
    return Walked(sheet, closed, below)


def open_private(path: bytes, *, mountpoint: bytes) -> int:
    """Open a lower directory so that nothing mounted on or below it, and no write, can get at it.

    With the privilege, the descriptor is of a private read-only copy of the mount.  Without, it is the directory
    as it stands.

    Raises:
        SetupError: It is missing, no directory, unreadable, or holds the mount point and cannot be copied.
    """
    try:
        plain = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        what = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is not a directory"}
        reason = what.get(error.errno or 0, f"cannot be read ({error.strerror})")
        msg = f"lower directory {os.fsdecode(path)} {reason}: check lowerdir="
        raise SetupError(msg) from error
    for recursive in (False, True):
        try:
            clone = syscalls.clone_tree(plain, b"", recursive=recursive)
        except OSError:
            continue
        os.close(plain)
        _protect(clone, recursive=recursive)
        return _reopen(clone)
    real = os.path.realpath(path)
    if os.path.commonpath([real, os.path.realpath(mountpoint)]) == real:
        msg = (
            f"mount point {os.fsdecode(mountpoint)} lies inside the lower directory {os.fsdecode(path)}: "
            "choose another mount point, or run with CAP_SYS_ADMIN"
        )
        raise SetupError(msg)
    return plain


def _protect(clone: int, *, recursive: bool) -> None:
    for attributes in (
        syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOATIME,
        syscalls.MOUNT_ATTR_RDONLY,
    ):
        with contextlib.suppress(OSError):
            syscalls.set_mount_attributes(clone, attributes, recursive=recursive)
            return


def _reopen(clone: int) -> int:
    """open_tree gives an O_PATH descriptor; the layer wants one that can be listed."""
    try:
        fd = os.open(b".", _DIR_FLAGS, dir_fd=clone)
    except PermissionError:
        return clone
    os.close(clone)
    return fd
