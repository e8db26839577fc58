"""Copy-up: what it takes to make a complete copy of a lower object in the staging directory.

Nothing here publishes: the tree renames the finished copy into place.  Order matters: owner first (chown clears
set-user-id), then mode, then attributes (capabilities, ACLs), times last.

Threading: `copy_data` touches nothing but its two descriptors and may run in a worker thread.

Source: Linux Documentation/filesystems/overlayfs.rst, "Non-directories"; lseek(2), copy_file_range(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from unionfs import faults, markers, syscalls

_CHUNK_BYTES = 16 << 20
_READ_BYTES = 1 << 20
_NO_RANGE_COPY = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EBADF}
)
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EPERM, errno.EACCES})


def copy_data(source_fd: int, target_fd: int, size_bytes: int, *, whole: bool) -> None:
    """Copy the first `size_bytes` bytes, sharing blocks where the file system can, keeping holes.

    Args:
        whole: `size_bytes` is the whole of the source, so that its blocks may be shared in one go.

    Raises:
        OSError: ENOSPC, EDQUOT, EIO ... of either file.
    """
    faults.point("copyup.data")
    if size_bytes == 0:
        return
    if whole and syscalls.reflink(source_fd, target_fd):
        return
    os.ftruncate(target_fd, size_bytes)
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(source_fd, offset, os.SEEK_DATA)
            end = min(os.lseek(source_fd, start, os.SEEK_HOLE), size_bytes)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            if error.errno != errno.EINVAL:
                raise
            start, end = offset, size_bytes  # the file system does not tell
        if start >= size_bytes:
            return
        _copy_range(source_fd, target_fd, start, end)
        offset = end


def _copy_range(source_fd: int, target_fd: int, start: int, end: int) -> None:
    offset = start
    in_kernel = True
    while offset < end:
        count = min(end - offset, _CHUNK_BYTES)
        if in_kernel:
            try:
                done = os.copy_file_range(source_fd, target_fd, count, offset, offset)
            except OSError as error:
                if error.errno not in _NO_RANGE_COPY:
                    raise
                in_kernel = False
                continue
        else:
            data = os.pread(source_fd, min(count, _READ_BYTES), offset)
            done = _write_all(target_fd, data, offset)
        if done == 0:
            return  # the source is shorter than it was
        offset += done


def _write_all(fd: int, data: bytes, offset: int) -> int:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
    return len(data)


def copy_xattrs(source: bytes, target: bytes) -> None:
    """Copy all attributes but markers; `source` and `target` are paths whose last part is not followed.

    Raises:
        OSError: ENOSPC, EDQUOT, EIO ...; what the upper file system or a user namespace cannot hold is left out.
    """
    for name in markers.list_xattrs(source):
        if markers.is_private_xattr(os.fsencode(name)):
            continue
        value = markers.get_xattr(source, name)
        if value is None:
            continue
        try:
            os.setxattr(target, name, value, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise


def make_special(st: os.stat_result, target: bytes | None, dir_fd: int, name: bytes) -> None:
    """Make a symbolic link (to `target`), directory, device, FIFO or socket under `name`, without metadata.

    Raises:
        OSError: EPERM for a device in a user namespace; ENOSPC ...
    """
    if target is not None:
        os.symlink(target, name, dir_fd=dir_fd)
    elif stat.S_ISDIR(st.st_mode):
        os.mkdir(name, 0o700, dir_fd=dir_fd)
    else:
        os.mknod(name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=dir_fd)


def copy_metadata(
    st: os.stat_result, source: bytes, target: bytes, *, dir_fd: int, name: bytes
) -> None:
    """Give the staged object `name` the owner, mode and attributes of the lower one; times are set apart.

    Args:
        source: Path of the lower object for the *xattr calls.
        target: Path of the staged object for the *xattr calls.
    """
    with contextlib.suppress(PermissionError) if os.geteuid() != 0 else contextlib.nullcontext():
        os.chown(name, st.st_uid, st.st_gid, dir_fd=dir_fd, follow_symlinks=False)
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(name, stat.S_IMODE(st.st_mode), dir_fd=dir_fd)
    copy_xattrs(source, target)


def copy_times(st: os.stat_result, *, dir_fd: int, name: bytes) -> None:
    """Give `name` the access and modification times of `st`, to the nanosecond."""
    os.utime(name, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
