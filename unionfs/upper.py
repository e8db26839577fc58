"""The only writer: the upper layer and its work directory.

    UPPER/            what the union shows of it, markers beside
    WORK/work/        staging: objects are made here, complete, and published by one rename; swept at mount
    WORK/work/times-* times of an indexed file that is being changed in place; restored at mount
    WORK/links/       index of hard-linked copy-ups: <16 hex digits of the inode number shown> is a hard link of
                      the upper file, so that every lower name of one file finds the one copy

Both directories are locked (flock) while mounted.  Publishing is one rename(2), renameat2(2), link(2) or mknod(2);
a crash leaves the state before or after it, and at most leftovers in WORK/work.

Source: Linux Documentation/filesystems/overlayfs.rst, "Upper and Lower", "index".
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from unionfs import faults, markers, syscalls
from unionfs.errors import SetupError
from unionfs.layer import DirectoryLayer, DirectorySheet, FdCache
from unionfs.markers import Dialect

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOTE_PREFIX = b"times-"
_NOTE_FLAGS = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC
_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_WHITEOUT_MODE = stat.S_IFCHR


class Upper:
    """The writable top of a stack."""

    def __init__(
        self, layer: DirectoryLayer, *, work_fd: int, links_fd: int, locks: list[int]
    ) -> None:
        """Made by `open_upper`."""
        self.layer = layer
        self.dialect = layer.dialect
        self.work_fd = work_fd
        self.links_fd = links_fd
        self._locks = locks
        self._serial = 0
        self.indexed: set[bytes] = set(os.listdir(b"/proc/self/fd/%d" % links_fd))
        self._origin_name = self.dialect.name("mica.origin")

    @property
    def root(self) -> DirectorySheet:
        """The upper directory itself."""
        return self.layer.root

    def close(self) -> None:
        """Close the descriptors and so release the locks."""
        for fd in (self.work_fd, self.links_fd, *self._locks):
            os.close(fd)
        self.layer.close()

    # --- staging -------------------------------------------------------------------------------------------------

    def stage_name(self) -> bytes:
        """A name in the staging directory that was not used before."""
        self._serial += 1
        return b"#%x" % self._serial

    def staged_path(self, name: bytes) -> bytes:
        """A path of a staged object for the *xattr calls."""
        return b"/proc/self/fd/%d/%b" % (self.work_fd, name)

    def discard(self, name: bytes) -> None:
        """Remove a staged object, with all in it, if it is still there."""
        with contextlib.suppress(FileNotFoundError):
            remove_tree(self.work_fd, name)

    @contextlib.contextmanager
    def staged(self) -> Iterator[bytes]:
        """A name in the staging directory; whatever stands there on an error is removed."""
        name = self.stage_name()
        try:
            yield name
        except BaseException:
            self.discard(name)
            raise

    @contextlib.contextmanager
    def times_noted(self, ino: int, fd: int) -> Iterator[None]:
        """Change the indexed file `fd` in place; an error, or the mount after a crash, restores its times."""
        before = os.fstat(fd)
        times = before.st_atime_ns, before.st_mtime_ns
        note = _NOTE_PREFIX + self.index_name(ino)
        os.close(os.open(note, _NOTE_FLAGS, 0o600, dir_fd=self.work_fd))
        os.utime(note, ns=times, dir_fd=self.work_fd)
        try:
            yield
        except BaseException:
            os.utime(fd, ns=times)
            raise
        finally:
            os.unlink(note, dir_fd=self.work_fd)

    # --- markers -------------------------------------------------------------------------------------------------

    def put_whiteout(self, sheet: DirectorySheet, name: bytes) -> None:
        """Hide `name`, which has nothing in the upper layer."""
        if self.dialect.devices:
            os.mknod(name, _WHITEOUT_MODE, 0, dir_fd=sheet.fd())
        else:
            self.put_aufs_whiteout(sheet, name)

    def put_aufs_whiteout(self, sheet: DirectorySheet, name: bytes) -> None:
        """Make `.wh.NAME` (nothing happens when it is there)."""
        flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(markers.AUFS_PREFIX + name, flags, 0o600, dir_fd=sheet.fd()))

    def clear_aufs_whiteout(self, sheet: DirectorySheet, name: bytes) -> None:
        """Remove `.wh.NAME` if it is there: an object stands under `name` now."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(markers.AUFS_PREFIX + name, dir_fd=sheet.fd())

    def has_whiteout(self, sheet: DirectorySheet, name: bytes) -> bool:
        """Whether a whiteout device stands under `name` in the upper directory."""
        try:
            return markers.is_whiteout_stat(os.stat(name, dir_fd=sheet.fd(), follow_symlinks=False))
        except FileNotFoundError:
            return False

    def replace_by_whiteout(self, sheet: DirectorySheet, name: bytes) -> None:
        """Put a whiteout in the place of the upper object `name`, which is no directory, in one step."""
        if not self.dialect.devices:
            self.put_aufs_whiteout(sheet, name)
            os.unlink(name, dir_fd=sheet.fd())
            return
        with self.staged() as staged:
            os.mknod(staged, _WHITEOUT_MODE, 0, dir_fd=self.work_fd)
            faults.point("unlink.whiteout-staged")
            os.rename(staged, name, src_dir_fd=self.work_fd, dst_dir_fd=sheet.fd())

    def swap_directory_for_whiteout(self, sheet: DirectorySheet, name: bytes) -> None:
        """Put a whiteout in the place of the upper directory `name`, then remove the directory."""
        if not self.dialect.devices:
            self.put_aufs_whiteout(sheet, name)
            self.remove_directory(sheet, name)
            return
        with self.staged() as staged:
            os.mknod(staged, _WHITEOUT_MODE, 0, dir_fd=self.work_fd)
            faults.point("rmdir.whiteout-staged")
            syscalls.renameat2(self.work_fd, staged, sheet.fd(), name, syscalls.RENAME_EXCHANGE)
            faults.point("rmdir.exchanged")
        self.discard(staged)

    def remove_directory(self, sheet: DirectorySheet, name: bytes) -> None:
        """Remove the upper directory `name`, which holds nothing but whiteouts, in one step."""
        try:
            os.rmdir(name, dir_fd=sheet.fd())
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            staged = self.stage_name()
            os.rename(name, staged, src_dir_fd=sheet.fd(), dst_dir_fd=self.work_fd)
            self.discard(staged)

    def make_opaque(self, path: bytes, dir_fd: int) -> None:
        """Let nothing further down show through a directory, given by a path for *xattr and by descriptor."""
        if self.dialect.xattrs:
            os.setxattr(path, self.dialect.name("opaque"), b"y", follow_symlinks=False)
        else:
            flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(markers.AUFS_OPAQUE, flags, 0o600, dir_fd=dir_fd))

    def set_redirect(self, path: bytes, target: bytes) -> None:
        """Note on an object, given by a path for *xattr, where it is in the lower layers."""
        os.setxattr(path, self.dialect.name("redirect"), target, follow_symlinks=False)

    def make_impure(self, sheet: DirectorySheet) -> None:
        """Note on an upper directory that it may hold copied-up entries."""
        if self.dialect.xattrs and not sheet.marks().impure:
            os.setxattr(sheet.xattr_path(None), self.dialect.name("impure"), b"y")
            sheet.forget_marks()
            sheet.impure = True

    # --- origin and index ----------------------------------------------------------------------------------------

    def read_origin(self, path: bytes) -> int | None:
        """The inode number that a copied-up object goes on showing, if it is marked."""
        if not self.dialect.xattrs:
            return None
        return markers.unpack_origin(markers.get_xattr(path, self._origin_name))

    def write_origin(self, target: bytes | int, ino: int) -> None:
        """Mark a staged object with the inode number that it goes on showing; nothing where it cannot be kept."""
        if not self.dialect.xattrs:
            return
        try:
            follow = isinstance(target, int)
            os.setxattr(target, self._origin_name, markers.pack_origin(ino), follow_symlinks=follow)
        except OSError as error:
            # user.* attributes are refused on symbolic links and special files (xattr(7))
            if error.errno not in {errno.EPERM, errno.EOPNOTSUPP}:
                raise

    @staticmethod
    def index_name(ino: int) -> bytes:
        """The name in the index for the inode number shown."""
        return b"%016x" % ino

    def read_standing(self, index_name: bytes) -> int:
        """How many lower names of an indexed file still stand."""
        path = b"/proc/self/fd/%d/%b" % (self.links_fd, index_name)
        return markers.unpack_nlink(markers.get_xattr(path, self.dialect.name("nlink")))

    def write_standing(self, index_name: bytes, standing: int) -> None:
        """Note how many lower names of an indexed file still stand."""
        if not self.dialect.xattrs:
            return
        path = b"/proc/self/fd/%d/%b" % (self.links_fd, index_name)
        with contextlib.suppress(PermissionError):
            value = markers.pack_nlink(standing)
            os.setxattr(path, self.dialect.name("nlink"), value, follow_symlinks=False)

    def drop_index(self, index_name: bytes) -> None:
        """The last name of an indexed file is gone."""
        self.indexed.discard(index_name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(index_name, dir_fd=self.links_fd)


def remove_tree(dir_fd: int, name: bytes) -> None:
    """Remove `name` and all below it, following no symbolic link.

    Raises:
        OSError: Something could not be removed.
    """
    try:
        os.unlink(name, dir_fd=dir_fd)
    except IsADirectoryError:
        pass
    except PermissionError:  # what unlink(2) says of a directory on some file systems
        if not stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
            raise
    else:
        return
    fd = os.open(name, _OPEN_DIR | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        for entry in os.listdir(b"/proc/self/fd/%d" % fd):
            remove_tree(fd, entry)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=dir_fd)


def open_upper(
    path: bytes, work: bytes, *, cache: FdCache, volatile: bool, prefer_user_xattrs: bool
) -> Upper:
    """Open, lock and probe an upper directory and its work directory, and sweep what a crash left in it.

    Raises:
        SetupError: Missing, busy, on two file systems, or on one that cannot hold an upper layer.
    """
    with contextlib.ExitStack() as opened:
        upper_fd = _owned(opened, _open_named(path, "upper directory", "upperdir="))
        work_top = _owned(opened, _open_named(work, "work directory", "workdir="))
        if os.fstat(upper_fd).st_dev != os.fstat(work_top).st_dev:
            msg = (
                f"upper directory {os.fsdecode(path)} and work directory {os.fsdecode(work)} are on different file "
                "systems: put workdir= beside upperdir="
            )
            raise SetupError(msg)
        _refuse_overlap(path, work)
        _lock(work_top, work, "work directory")
        _lock(upper_fd, path, "upper directory")
        _volatile_gate(work_top, work)
        try:
            for sub in (b"work", b"links"):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(sub, 0o700, dir_fd=work_top)
            sub_flags = _OPEN_DIR | os.O_NOFOLLOW
            work_fd = _owned(opened, os.open(b"work", sub_flags, dir_fd=work_top))
            links_fd = _owned(opened, os.open(b"links", sub_flags, dir_fd=work_top))
            for leftover in os.listdir(b"/proc/self/fd/%d" % work_fd):
                if leftover.startswith(_NOTE_PREFIX):
                    _restore_times(work_fd, leftover, links_fd)
                remove_tree(work_fd, leftover)
            dialect = _probe(work_fd, path, prefer_user_xattrs=prefer_user_xattrs)
            if volatile:
                os.makedirs(b"/proc/self/fd/%d/incompat/volatile" % work_fd, exist_ok=True)
        except OSError as error:
            msg = f"upper directory {os.fsdecode(path)} cannot be written: {error.strerror}"
            raise SetupError(msg) from error
        layer = DirectoryLayer(os.dup(upper_fd), path, index=-1, dialect=dialect, cache=cache)
        opened.pop_all()
        return Upper(layer, work_fd=work_fd, links_fd=links_fd, locks=[work_top, upper_fd])


def _owned(opened: contextlib.ExitStack, fd: int) -> int:
    """Close `fd` (and so release its lock) unless the upper takes it over."""
    opened.callback(os.close, fd)
    return fd


def _restore_times(work_fd: int, note: bytes, links_fd: int) -> None:
    """Undo what a crash in `Upper.times_noted` left: the note has the times of the indexed file."""
    st = os.stat(note, dir_fd=work_fd, follow_symlinks=False)
    with contextlib.suppress(FileNotFoundError):
        os.utime(
            note.removeprefix(_NOTE_PREFIX),
            ns=(st.st_atime_ns, st.st_mtime_ns),
            dir_fd=links_fd,
            follow_symlinks=False,
        )


def _open_named(path: bytes, what: str, option: str) -> int:
    try:
        return os.open(path, _OPEN_DIR)
    except OSError as error:
        reasons = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is not a directory"}
        reason = reasons.get(error.errno or 0, f"cannot be opened ({error.strerror})")
        msg = f"{what} {os.fsdecode(path)} {reason}: check {option}"
        raise SetupError(msg) from error


def _refuse_overlap(path: bytes, work: bytes) -> None:
    upper_real, work_real = os.path.realpath(path), os.path.realpath(work)
    if os.path.commonpath([upper_real, work_real]) in {upper_real, work_real}:
        msg = (
            f"work directory {os.fsdecode(work)} and upper directory {os.fsdecode(path)} lie inside one another: "
            "choose separate directories"
        )
        raise SetupError(msg)


def _lock(fd: int, path: bytes, what: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        msg = f"{what} {os.fsdecode(path)} is busy: another mount uses it; unmount that, or choose another"
        raise SetupError(msg) from error


def _volatile_gate(work_top: int, work: bytes) -> None:
    try:
        os.stat(b"/proc/self/fd/%d/work/incompat/volatile" % work_top)
    except OSError:
        return
    msg = (
        f"work directory {os.fsdecode(work)} was last mounted volatile and may have lost data in a crash: "
        "use a fresh upper, or remove its work/incompat/volatile if you trust it"
    )
    raise SetupError(msg)


def _probe(work_fd: int, path: bytes, *, prefer_user_xattrs: bool) -> Dialect:
    """Find out how this file system can spell markers, by making some."""
    probe = b"#probe"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=work_fd))
    try:
        prefix = _probe_xattrs(
            b"/proc/self/fd/%d/%b" % (work_fd, probe), prefer_user=prefer_user_xattrs
        )
    finally:
        os.unlink(probe, dir_fd=work_fd)
    devices = _probe_devices(work_fd) and not os.environ.get("FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT")
    if prefix is None and not _can_create(work_fd):
        msg = f"upper directory {os.fsdecode(path)} is on a file system that cannot hold an upper layer"
        raise SetupError(msg)
    return Dialect(prefix or markers.USER_PREFIX, xattrs=prefix is not None, devices=devices)


def _probe_xattrs(path: bytes, *, prefer_user: bool) -> bytes | None:
    prefixes = [markers.TRUSTED_PREFIX, markers.USER_PREFIX]
    for prefix in prefixes[1:] if prefer_user else prefixes:
        with contextlib.suppress(OSError):
            os.setxattr(path, prefix.decode() + "mica.probe", b"y")
            return prefix
    return None


def _probe_devices(work_fd: int) -> bool:
    """Whether whiteout devices can be made, and swapped with directories."""
    device, other = b"#probe-whiteout", b"#probe-other"
    try:
        os.mknod(device, _WHITEOUT_MODE, 0, dir_fd=work_fd)
        os.mkdir(other, 0o700, dir_fd=work_fd)
        syscalls.renameat2(work_fd, device, work_fd, other, syscalls.RENAME_EXCHANGE)
    except OSError:
        return False
    else:
        return True
    finally:
        for name in (device, other):
            with contextlib.suppress(FileNotFoundError):
                remove_tree(work_fd, name)


def _can_create(work_fd: int) -> bool:
    """Whether names that AUFS's markers need can be made and renamed over each other."""
    first, second = b"#probe-1", b"#probe-2"
    try:
        for name in (first, second):
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=work_fd))
        os.rename(first, second, src_dir_fd=work_fd, dst_dir_fd=work_fd)
        os.unlink(second, dir_fd=work_fd)
    except OSError:
        return False
    return True
