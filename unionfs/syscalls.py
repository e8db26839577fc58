"""The door to ctypes: the system calls that Python 3.11's `os` lacks, one shape for every wrapper.

Each constant names its kernel header.  Nothing here knows what a union is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
AT_RECURSIVE = 0x8000  # linux/fcntl.h
AT_SYMLINK_FOLLOW = 0x400  # linux/fcntl.h
FICLONE = 0x40049409  # linux/fs.h
MOUNT_ATTR_NOATIME = 0x00000010  # linux/mount.h
MOUNT_ATTR_NODEV = 0x00000004  # linux/mount.h
MOUNT_ATTR_RDONLY = 0x00000001  # linux/mount.h
OPEN_TREE_CLOEXEC = os.O_CLOEXEC  # linux/mount.h
OPEN_TREE_CLONE = 1  # linux/mount.h
PR_SET_SECUREBITS = 28  # linux/prctl.h
RENAME_EXCHANGE = 2  # linux/fs.h
RENAME_NOREPLACE = 1  # linux/fs.h
RENAME_WHITEOUT = 4  # linux/fs.h
SECBIT_NO_SETUID_FIXUP = 1 << 2  # linux/securebits.h
UTIME_NOW = (1 << 30) - 1  # linux/stat.h
UTIME_OMIT = (1 << 30) - 2  # linux/stat.h

# Numbers of system calls are the same on every architecture from 424 on (asm-generic/unistd.h).
_SYS_OPEN_TREE = 428
_SYS_MOUNT_SETATTR = 442

libc = ctypes.CDLL(None, use_errno=True)
libc.renameat2.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
]
libc.setfsuid.argtypes = [ctypes.c_uint]
libc.setfsgid.argtypes = [ctypes.c_uint]
libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
libc.linkat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
libc.syscall.restype = ctypes.c_long

MNT_DETACH = 2  # linux/fs.h


_M_MMAP_THRESHOLD = -3  # malloc.h
_M_TRIM_THRESHOLD = -1  # malloc.h
_MOUNT_ATTR = struct.Struct(
    "QQQQ"
)  # linux/mount.h, struct mount_attr: set, clear, propagation, userns


def _oserror(filename: bytes | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), filename)


def renameat2(
    old_dir_fd: int, old_name: bytes, new_dir_fd: int, new_name: bytes, flags: int
) -> None:
    """Rename with RENAME_* flags (renameat2(2)).

    Raises:
        OSError: EINVAL where the file system lacks the flag; otherwise as rename(2).
    """
    if libc.renameat2(old_dir_fd, old_name, new_dir_fd, new_name, flags) < 0:
        raise _oserror(new_name)


def link_fd(fd: int, new_dir_fd: int, new_name: bytes) -> None:
    """Give the open file `fd` a name (linkat(2) with AT_SYMLINK_FOLLOW on /proc/self/fd).

    Raises:
        OSError: ENOENT when the file has no link left; otherwise as link(2).
    """
    path = b"/proc/self/fd/%d" % fd
    if libc.linkat(-100, path, new_dir_fd, new_name, AT_SYMLINK_FOLLOW) < 0:
        raise _oserror(new_name)


def setfsuid(uid: int) -> None:
    """Act as `uid` in the file system calls of this thread (setfsuid(2)); never fails."""
    libc.setfsuid(uid)


def setfsgid(gid: int) -> None:
    """Act as group `gid` in the file system calls of this thread (setfsgid(2)); never fails."""
    libc.setfsgid(gid)


def keep_capabilities_across_setfsuid() -> bool:
    """Let `setfsuid` change the owner of new files only, not the privileges of this process.

    Returns:
        False when the process may not set its securebits (capabilities(7)): it has no CAP_SETPCAP.
    """
    return bool(libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0)


def clone_tree(dir_fd: int, path: bytes, *, recursive: bool) -> int:
    """Make a private copy of the mount below `path` and return a descriptor of it (open_tree(2)).

    The copy is attached to nothing: it goes when the descriptor is closed.  Without `recursive` mounts below
    `path` are left out.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.2, EINVAL where a locked mount is below.
    """
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH
    if recursive:
        flags |= AT_RECURSIVE
    fd: int = libc.syscall(_SYS_OPEN_TREE, dir_fd, path, flags)
    if fd < 0:
        raise _oserror(path)
    return fd


def set_mount_attributes(mount_fd: int, attributes: int, *, recursive: bool) -> None:
    """Set MOUNT_ATTR_* on a mount made by `clone_tree` (mount_setattr(2)).

    Raises:
        OSError: EPERM where the attribute is locked, ENOSYS before Linux 5.12.
    """
    attr = ctypes.create_string_buffer(_MOUNT_ATTR.pack(attributes, 0, 0, 0), _MOUNT_ATTR.size)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    if libc.syscall(_SYS_MOUNT_SETATTR, mount_fd, b"", flags, attr, _MOUNT_ATTR.size) < 0:
        raise _oserror()


def unmount(path: bytes, flags: int = 0) -> None:
    """Unmount `path` (umount2(2)).

    Raises:
        OSError: EBUSY while it is in use, EINVAL when it is no mount point, EPERM without privilege.
    """
    if libc.umount2(path, flags) < 0:
        raise _oserror(path)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed: the buffers of large writes are not mapped and cleared anew (mallopt(3))."""
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def reflink(source_fd: int, target_fd: int) -> bool:
    """Share all data of `source_fd` with `target_fd` (ioctl FICLONE); False where that cannot be had."""
    try:
        fcntl.ioctl(target_fd, FICLONE, source_fd)
    except OSError as error:
        if error.errno in {
            errno.EOPNOTSUPP,
            errno.EXDEV,
            errno.EINVAL,
            errno.ENOTTY,
            errno.EPERM,
            errno.EACCES,
            errno.ENOSYS,
            errno.EBADF,
        }:
            return False
        raise
    return True


def cells_holding(thing: object, number: int) -> list[ctypes.c_uint64]:
    """The aligned 8-byte cells inside the memory of an extension object that hold `number`, in order.

    Writing to a cell changes the object; `thing` must outlive the cells.
    """
    size = ctypes.sizeof(ctypes.c_uint64)
    first = id(thing)
    cells = [
        ctypes.c_uint64.from_address(first + offset)
        for offset in range(0, thing.__sizeof__() - size + 1, size)
    ]
    return [cell for cell in cells if cell.value == number]
