"""An fsck for an upper: every contradiction in its markers, as a list; nothing is changed.

The rule: what a kernel overlayfs or mica itself would have written is no fault, in either dialect.
A `.wh.NAME` beside NAME is none either: it says that NAME is shown and nothing under it.

The upper must not be mounted meanwhile.  Directories are walked by descriptor, one at a time, and
no symlink in the upper or in a lower is followed.  Without CAP_SYS_ADMIN the kernel hides
`trusted.` attributes, so that only the `user.` dialect is checked.

    WORK/work/      staging: swept at mount, empty after an orderly unmount
    WORK/links/     one name per hard-linked lower file that was copied up: its inode number in hex

Sources: Linux Documentation/filesystems/overlayfs.rst; fs/overlayfs/namei.c (ovl_lookup,
ovl_check_redirect), fs/overlayfs/util.c (ovl_check_metacopy_xattr), fs/overlayfs/inode.c
(ovl_get_nlink).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from unionfs import markers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class FaultKind(Enum):
    """What is wrong, and what to do about it."""

    WHITEOUT_IN_OPAQUE = "a whiteout in an opaque directory hides nothing; remove it"
    WHITEOUT_NAME = "a whiteout that names nothing; remove it"
    WHITEOUT_SHAPE = "a whiteout is an empty file, so what this holds is never shown; move it away"
    WHITEOUT_UNREAD = (
        "a whiteout attribute counts only in a directory with overlay.opaque=x;"
        " remove the file, or mark its directory"
    )
    OPAQUE_ON_FILE = "only a directory can be opaque; remove the attribute"
    OPAQUE_VALUE = "opaque is y or x; set it to y, or remove the attribute"
    REDIRECT_ON_FILE = "only a directory or a regular file can be redirected; remove the attribute"
    REDIRECT_VALUE = (
        "a redirect is one name, or an absolute path without empty, . or .. parts; correct it"
    )
    REDIRECT_OPAQUE = (
        "an opaque directory has nothing below it to redirect to; remove one of the attributes"
    )
    REDIRECT_DANGLING = "no lower has a directory there; correct the redirect, or name all lowers"
    METACOPY_ON_OTHER = "only a regular file can be a metacopy; remove the attribute"
    METACOPY_VALUE = "the metacopy attribute is malformed; make it empty"
    METACOPY_WITHOUT_DATA = (
        "no lower holds the data of this metacopy; name all lowers, or remove it"
    )
    ORIGIN_VALUE = "the origin is no inode number in the known format; remove the attribute"
    ORIGIN_NOT_IMPURE = (
        "it has an origin but its directory is not marked impure, so that a listing shows another"
        " inode number; set overlay.impure=y on the directory"
    )
    NLINK_ON_DIRECTORY = "a directory has no link count to keep; remove the attribute"
    NLINK_VALUE = "a link count is U or L, a sign and a number; remove the attribute"
    WORK_LEFTOVER = "left over from an operation that did not end; the next mount sweeps it"
    WORK_VOLATILE = (
        "the upper was mounted volatile; throw it away if the machine crashed, else remove this"
    )
    LINK_NAME = "an index entry is named by 16 hexadecimal digits; remove it"
    LINK_SHAPE = "an index entry is not a directory; remove it"
    LINK_ORIGIN = "an index entry is named by its origin; remove it"
    UNREADABLE = "it could not be read; see to the file system that holds it"


@dataclass(frozen=True, slots=True)
class Fault:
    """One contradiction.

    Attributes:
        path: Where, beginning with the directory as it was given.
        kind: What.
        detail: What was found there, in a few words; empty when the kind says it all.
    """

    path: bytes
    kind: FaultKind
    detail: str = ""

    @property
    def message(self) -> str:
        """What is wrong and what to do, in one line."""
        return f"{self.detail}: {self.kind.value}" if self.detail else self.kind.value

    def __str__(self) -> str:  # typing has it from 3.12 on
        return f"{_printable(self.path)}: {self.message}"


def check_upper(
    upper: bytes, lowers: Sequence[bytes] = (), work: bytes | None = None
) -> list[Fault]:
    """List the contradictions of an upper; an empty list means that it is sound.

    Args:
        upper: The upper directory.
        lowers: All directories below it, topmost first; without them nothing is said about what
            the upper's markers refer to.
        work: Its work directory, to be checked as well.

    Raises:
        OSError: One of these directories could not be opened, or a lower not be read.
    """
    with contextlib.ExitStack() as stack:
        below = _Lowers([_open_root(stack, lower) for lower in lowers]) if lowers else None
        walk = _Walk(below)
        walk.run(upper)
        walk.faults.sort(key=lambda fault: fault.path)
        if work is not None:
            walk.faults.extend(_check_work(_open_root(stack, work), work))
    return walk.faults


def _open_root(stack: contextlib.ExitStack, path: bytes) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


# --- one object -----------------------------------------------------------------------------------


_PREFIXES = (markers.TRUSTED_PREFIX, markers.USER_PREFIX)


@dataclass(slots=True)
class _Object:
    """One directory entry: what stat says, and its markers by their full names."""

    path: bytes
    name: bytes
    st: os.stat_result
    marks: dict[str, bytes] = field(default_factory=dict)

    def values(self, marker: str) -> list[bytes]:
        """The values of a marker, in either dialect."""
        names = [prefix.decode() + marker for prefix in _PREFIXES]
        return [self.marks[name] for name in names if name in self.marks]

    def opaque_values(self) -> list[bytes]:
        """The values of every attribute that can make a directory opaque."""
        others = self.marks.get(markers.FUSE_OVERLAYFS_OPAQUE)
        return self.values("opaque") + ([] if others is None else [others])

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.st.st_mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.st.st_mode)

    def redirect(self) -> tuple[bool, list[bytes]] | None:
        """The redirect, split, if there is one that can be followed."""
        split = map(markers.parse_redirect, self.values("redirect"))
        return next((redirect for redirect in split if redirect is not None), None)


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory of one lower.

    Attributes:
        layer: Which lower, 0 for the topmost.
        path: Where in it, without a leading slash; empty for its root.
    """

    layer: int
    path: bytes


@dataclass(slots=True)
class _Directory:
    """The directory being walked.

    Attributes:
        object: Itself.
        aufs_opaque: It holds `.wh..wh..opq`.
        below: The directories of the lowers that are merged with it; None when no lowers are known.
    """

    object: _Object
    aufs_opaque: bool = False
    below: tuple[_Place, ...] | None = None

    @property
    def is_opaque(self) -> bool:
        return self.aufs_opaque or b"y" in self.object.opaque_values()


def _read_object(parent_fd: int, path: bytes, name: bytes) -> _Object:
    """Read an entry of an open directory, without following or opening it."""
    st = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    place = b"/proc/self/fd/%d/%s" % (parent_fd, name)
    return _Object(path, name, st, _read_marks(place))


def _read_marks(place: bytes | int) -> dict[str, bytes]:
    marks = {}
    for name in markers.list_xattrs(place):
        if markers.is_private_xattr(os.fsencode(name)):
            value = markers.get_xattr(place, name)
            if value is not None:
                marks[name] = value
    return marks


# --- the rules, each for one object in its directory ----------------------------------------------


def _whiteout_rule(entry: _Object, directory: _Directory) -> Iterator[Fault]:
    by_name = markers.is_marker_name(entry.name) and not entry.name.startswith(_AUFS_OWN)
    by_attribute = bool(entry.values("whiteout"))
    if by_name and entry.name[len(markers.AUFS_PREFIX) :] in {b"", b".", b".."}:
        yield Fault(entry.path, FaultKind.WHITEOUT_NAME)
    if (by_name or by_attribute) and not (entry.is_regular and entry.st.st_size == 0):
        yield Fault(entry.path, FaultKind.WHITEOUT_SHAPE)
    if directory.is_opaque and (by_name or by_attribute or markers.is_whiteout_stat(entry.st)):
        yield Fault(entry.path, FaultKind.WHITEOUT_IN_OPAQUE)
    elif by_attribute and b"x" not in directory.object.opaque_values():
        yield Fault(entry.path, FaultKind.WHITEOUT_UNREAD)


_AUFS_OWN = b".wh..wh."
"""Files of AUFS itself: `.wh..wh..opq`, `.wh..wh.plnk`, `.wh..wh.orph`, `.wh..wh.aufs`."""


def _opaque_rule(entry: _Object, _directory: _Directory) -> Iterator[Fault]:
    values = entry.opaque_values()
    if values and not entry.is_directory:
        yield Fault(entry.path, FaultKind.OPAQUE_ON_FILE)
        return
    for value in values:
        if value not in {b"y", b"x"}:
            yield Fault(entry.path, FaultKind.OPAQUE_VALUE, f"opaque is {_shown(value)}")


def _redirect_rule(entry: _Object, _directory: _Directory) -> Iterator[Fault]:
    values = entry.values("redirect")
    if not values:
        return
    # On a regular file overlayfs leaves it behind when a moved metacopy gets its data.
    if not entry.is_directory and not entry.is_regular:
        yield Fault(entry.path, FaultKind.REDIRECT_ON_FILE)
        return
    for value in values:
        if markers.parse_redirect(value) is None:
            yield Fault(entry.path, FaultKind.REDIRECT_VALUE, f"redirect is {_shown(value)}")
    if entry.is_directory and b"y" in entry.opaque_values():
        yield Fault(entry.path, FaultKind.REDIRECT_OPAQUE)


def _metacopy_rule(entry: _Object, _directory: _Directory) -> Iterator[Fault]:
    values = entry.values("metacopy")
    if values and not entry.is_regular:
        yield Fault(entry.path, FaultKind.METACOPY_ON_OTHER)
        return
    for value in values:
        if value and (len(value) < _METACOPY_HEADER_BYTES or value[:2] != bytes([0, len(value)])):
            yield Fault(entry.path, FaultKind.METACOPY_VALUE, f"metacopy is {_shown(value)}")


_METACOPY_HEADER_BYTES = 4
"""struct ovl_metacopy: version 0, length, flags, digest algorithm, then perhaps a digest."""


def _origin_rule(entry: _Object, directory: _Directory) -> Iterator[Fault]:
    values = entry.values("mica.origin")
    for value in values:
        if markers.unpack_origin(value) is None:
            yield Fault(entry.path, FaultKind.ORIGIN_VALUE, f"{len(value)} bytes {_shown(value)}")
    if values and not entry.is_directory and not directory.object.values("impure"):
        yield Fault(entry.path, FaultKind.ORIGIN_NOT_IMPURE)


def _nlink_rule(entry: _Object, _directory: _Directory) -> Iterator[Fault]:
    return _nlink_faults(entry)


def _nlink_faults(entry: _Object) -> Iterator[Fault]:
    values = entry.values("nlink")
    if values and entry.is_directory:
        yield Fault(entry.path, FaultKind.NLINK_ON_DIRECTORY)
        return
    for value in values:
        if not re.fullmatch(rb"[UL][+-][0-9]{1,10}", value):
            yield Fault(entry.path, FaultKind.NLINK_VALUE, f"nlink is {_shown(value)}")


_RULES: tuple[Callable[[_Object, _Directory], Iterator[Fault]], ...] = (
    _whiteout_rule,
    _opaque_rule,
    _redirect_rule,
    _metacopy_rule,
    _origin_rule,
    _nlink_rule,
)
# Those that make sense without a directory around the object.
_ROOT_RULES = (_opaque_rule, _redirect_rule, _nlink_rule)


# --- the walk -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Frame:
    """A directory on the way from the root to the walk, and what is still to be entered in it."""

    directory: _Directory
    pending: list[_Object]


class _Walk:
    """One pass over an upper.  It holds one descriptor however deep the tree is."""

    def __init__(self, lowers: _Lowers | None) -> None:
        self.faults: list[Fault] = []
        self._lowers = lowers

    def run(self, upper: bytes) -> None:
        fd = os.open(upper, _OPEN_DIRECTORY)
        try:
            root = _Directory(_Object(upper, b"", os.fstat(fd), _read_marks(fd)))
            root.below = self._lowers.roots() if self._lowers else None
            for rule in _ROOT_RULES:
                self.faults.extend(rule(root.object, root))
            frames = [self._enter(fd, root)]
            while frames:
                if frames[-1].pending:
                    entry = frames[-1].pending.pop()
                    inner = _Directory(entry, below=self._below(entry, frames[-1].directory))
                    entered = self._move(fd, entry.name, entry)
                    if entered is not None:
                        os.close(fd)
                        fd = entered
                        frames.append(self._enter(fd, inner))
                else:
                    frames.pop()
                    if frames:
                        parent = frames[-1].directory.object
                        back = self._move(fd, b"..", parent)
                        if back is None:
                            return
                        os.close(fd)
                        fd = back
        finally:
            os.close(fd)

    def _move(self, fd: int, name: bytes, to: _Object) -> int | None:
        """Open the directory `name`; None, and a fault, when it is not the one that was seen."""
        try:
            moved = os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        except OSError as error:
            self._unreadable(to.path, error)
            return None
        st = os.fstat(moved)
        if (st.st_dev, st.st_ino) == (to.st.st_dev, to.st.st_ino):
            return moved
        os.close(moved)
        self.faults.append(Fault(to.path, FaultKind.UNREADABLE, "changed while it was checked"))
        return None

    def _enter(self, fd: int, directory: _Directory) -> _Frame:
        """Check every entry of an open directory; the directories among them are left to enter."""
        frame = _Frame(directory, [])
        try:
            names = sorted(os.listdir(b"/proc/self/fd/%d" % fd))
        except OSError as error:
            self._unreadable(directory.object.path, error)
            return frame
        directory.aufs_opaque = markers.AUFS_OPAQUE in names
        for name in names:
            path = directory.object.path + b"/" + name
            try:
                entry = _read_object(fd, path, name)
            except OSError as error:
                self._unreadable(path, error)
                continue
            for rule in _RULES:
                self.faults.extend(rule(entry, directory))
            if entry.is_directory:
                frame.pending.append(entry)
            else:
                self._check_data(entry, directory)
        return frame

    def _check_data(self, entry: _Object, directory: _Directory) -> None:
        if self._lowers is None or directory.below is None:
            return
        if entry.is_regular and entry.values("metacopy"):
            hits = self._lowers.look_below(directory.below, entry.name, entry.redirect())
            found = next((kind for _, kind in hits if kind is not _Kind.METACOPY), None)
            if found is not _Kind.FILE:
                self.faults.append(Fault(entry.path, FaultKind.METACOPY_WITHOUT_DATA))

    def _below(self, entry: _Object, parent: _Directory) -> tuple[_Place, ...] | None:
        """The lowers' directories that an upper directory is merged with."""
        if self._lowers is None or parent.below is None:
            return None
        redirect = entry.redirect()
        if b"y" in entry.opaque_values():
            return ()
        hits = self._lowers.look_below(parent.below, entry.name, redirect)
        below = tuple(
            place
            for place, kind in itertools.takewhile(lambda hit: hit[1] is _Kind.DIRECTORY, hits)
        )
        if redirect is not None and not below:
            shown = ("/" if redirect[0] else "") + _printable(b"/".join(redirect[1]))
            self.faults.append(
                Fault(entry.path, FaultKind.REDIRECT_DANGLING, f"redirect is {shown}")
            )
        return below

    def _unreadable(self, path: bytes, error: OSError) -> None:
        self.faults.append(Fault(path, FaultKind.UNREADABLE, error.strerror or str(error)))


_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


# --- what the lowers have -------------------------------------------------------------------------


class _Kind(Enum):
    """What one lower has under a name."""

    DIRECTORY = "a directory"
    FILE = "a regular file with its data"
    METACOPY = "a regular file whose data is further down"
    OTHER = "something else"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one lower says: perhaps an object, and whether the lowers after it still count."""

    kind: _Kind | None
    closes: bool = False
    redirect: tuple[bool, list[bytes]] | None = None


class _Lowers:
    """The lowers, read by the rule by which a mount reads them."""

    def __init__(self, root_fds: Sequence[int]) -> None:
        self._root_fds = root_fds

    def roots(self) -> tuple[_Place, ...]:
        """Where the merge begins: the root of every lower."""
        return tuple(_Place(layer, b"") for layer in range(len(self._root_fds)))

    def look_below(
        self, parent: tuple[_Place, ...], name: bytes, redirect: tuple[bool, list[bytes]] | None
    ) -> Iterator[tuple[_Place, _Kind]]:
        """What `parent` has under `name`, topmost first, until one layer closes it.

        Source: fs/overlayfs/namei.c, ovl_lookup.
        """
        layer = -1
        while True:
            if redirect is not None and redirect[0]:
                parent, name = self.roots(), b"/".join(redirect[1])
            elif redirect is not None:
                name = redirect[1][0]
            redirect = None
            for place in parent:
                if place.layer <= layer:
                    continue
                layer = place.layer
                path = b"/".join(filter(None, (place.path, name)))
                seen = self._see(layer, path)
                if seen.kind is not None:
                    yield _Place(layer, path), seen.kind
                if seen.closes:
                    return
                if seen.redirect is not None:
                    redirect = seen.redirect
                    break
            else:
                return

    def _see(self, layer: int, path: bytes) -> _Seen:
        *above, name = path.split(b"/")
        fd = os.dup(self._root_fds[layer])
        try:
            for part in above:
                inner = os.open(part, _OPEN_DIRECTORY | os.O_PATH | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = inner
            closes = _exists(fd, markers.AUFS_PREFIX + name)
            try:
                found = _read_object(fd, path, name)
            except FileNotFoundError:
                return _Seen(None, closes=closes)
            return _judge(fd, found, closes=closes)
        except (FileNotFoundError, NotADirectoryError):
            return _Seen(None)
        finally:
            os.close(fd)


def _exists(fd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENAMETOOLONG}:
            return False
        raise
    return True


def _judge(fd: int, found: _Object, *, closes: bool) -> _Seen:
    """What an object of a lower means; `closes` when a `.wh.NAME` stands beside it."""
    if markers.is_whiteout_stat(found.st) or found.values("whiteout"):
        return _Seen(None, closes=True)
    if found.is_directory:
        opaque = b"y" in found.opaque_values()
        opaque = opaque or _exists(fd, found.name + b"/" + markers.AUFS_OPAQUE)
        return _Seen(_Kind.DIRECTORY, closes=closes or opaque, redirect=found.redirect())
    if found.is_regular and found.values("metacopy"):
        return _Seen(_Kind.METACOPY, closes=closes, redirect=found.redirect())
    return _Seen(_Kind.FILE if found.is_regular else _Kind.OTHER, closes=True)


# --- the work directory ---------------------------------------------------------------------------


def _check_work(work_fd: int, work: bytes) -> Iterator[Fault]:
    for name in _names_in(work_fd, b"work"):
        st = os.stat(b"work/" + name, dir_fd=work_fd, follow_symlinks=False)
        if markers.is_whiteout_stat(st):
            # The kernel makes its whiteouts as links of one, which it leaves here at umount
            # (fs/overlayfs/dir.c, ovl_whiteout).
            continue
        kind = FaultKind.WORK_LEFTOVER
        if name == b"incompat" and _exists(work_fd, b"work/incompat/volatile"):
            kind = FaultKind.WORK_VOLATILE
        yield Fault(b"%s/work/%s" % (work, name), kind)
    links = _names_in(work_fd, b"links")
    if links:
        fd = os.open(b"links", _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=work_fd)
        try:
            for name in links:
                yield from _check_link(_read_object(fd, b"%s/links/%s" % (work, name), name))
        finally:
            os.close(fd)


def _names_in(work_fd: int, name: bytes) -> list[bytes]:
    """The entries of a directory in the work directory; none when it was never made."""
    try:
        fd = os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=work_fd)
    except FileNotFoundError:
        return []
    try:
        return sorted(os.listdir(b"/proc/self/fd/%d" % fd))
    finally:
        os.close(fd)


def _check_link(entry: _Object) -> Iterator[Fault]:
    if not re.fullmatch(rb"[0-9a-f]{16}", entry.name):
        yield Fault(entry.path, FaultKind.LINK_NAME)
    elif entry.is_directory:
        yield Fault(entry.path, FaultKind.LINK_SHAPE)
    else:
        origins = list(map(markers.unpack_origin, entry.values("mica.origin")))
        # Symbolic links and special files cannot carry user. attributes (xattr(7)).
        if (entry.is_regular and not origins) or any(o != int(entry.name, 16) for o in origins):
            found = ", ".join("malformed" if o is None else f"{o:016x}" for o in origins)
            yield Fault(entry.path, FaultKind.LINK_ORIGIN, f"its origin is {found or 'missing'}")
    yield from _nlink_faults(entry)


# --- words ----------------------------------------------------------------------------------------


def _shown(value: bytes) -> str:
    longest = 64
    return repr(value[:longest])[1:] + ("..." if len(value) > longest else "")


def _printable(path: bytes) -> str:
    """A path on one line, whatever bytes it is made of."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
