"""Mount a stack, serve it until it is unmounted, and leave nothing behind.

Order: open and check all layers, lock and sweep the upper, mount, say that the mount serves, serve, unmount.
Whatever is wrong is found before anything is mounted (`SetupError`).

Signals: SIGTERM and SIGINT detach the mount and wait for its last users; SIGUSR1 writes the request counts to the
log.  SIGALRM ticks only while a worker thread copies or syncs: pyfuse3 reads the device with the interpreter locked,
and a request withdrawn between poll and read would leave that read, and the thread, waiting; the tick ends it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
from typing import TYPE_CHECKING

import trio

from unionfs import faults, layer, markers, syscalls
from unionfs.errors import SetupError
from unionfs.layer import DirectoryLayer, FdCache
from unionfs.markers import Dialect
from unionfs.operations import FOREVER_S, Replies, Session, UnionOperations
from unionfs.options import MountOptions, libfuse_options
from unionfs.owners import Owners
from unionfs.tree import UnionTree
from unionfs.upper import Upper, open_upper
from unionfs.view import TreeOptions

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("unionfs")

_FDS_KEPT_FREE = 256
_FD_CACHE_MAX = 4096
_TICK_S = 0.2
_DETACH_GRACE_S = 10.0
_WORK_SUFFIX = b".mica-work"


def serve(options: MountOptions, *, on_ready: Callable[[], None]) -> None:
    """Mount and serve until the mount is gone; `on_ready` is called once it serves.

    Raises:
        SetupError: The stack cannot be mounted as asked; nothing is mounted then.
    """
    faults.arm(os.environ.get("MICA_FAULT"))
    os.umask(0)
    syscalls.keep_capabilities_across_setfsuid()
    syscalls.keep_freed_memory()
    cache = FdCache(_raise_descriptor_limit())
    tree = build_tree(options, cache)
    try:
        _serve_tree(options, tree, cache, on_ready)
    finally:
        tree.close()


def _raise_descriptor_limit() -> int:
    """Use all descriptors that the hard limit allows; returns how many may hold directories."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _FD_CACHE_MAX
    return max(64, min(_FD_CACHE_MAX, (soft - _FDS_KEPT_FREE) // 4))


def build_tree(options: MountOptions, cache: FdCache) -> UnionTree:
    """Open, check and stack the layers.

    Raises:
        SetupError: One of them is missing, busy or unfit.
    """
    _check_mountpoint(options.mountpoint)
    _check_distinct(options)
    if options.xattr_permissions:
        msg = (
            f"xattr_permissions={options.xattr_permissions}: owners and modes are kept in the files themselves here, "
            "and attributes would be ignored; leave it out"
        )
        raise SetupError(msg)
    upper: Upper | None = None
    if options.upper is not None and not options.read_only:
        upper = open_upper(
            options.upper,
            _work_directory(options),
            cache=cache,
            volatile=options.volatile,
            prefer_user_xattrs=bool(options.userxattr),
        )
    dialect = upper.dialect if upper is not None else _reading_dialect(options)
    paths = list(options.lowers)
    if options.upper is not None and upper is None:
        paths.insert(0, options.upper)  # `ro`: the upper is read as the topmost layer
    first_data_only = len(paths)
    paths += options.data_lowers
    lowers = []
    for index, path in enumerate(paths):
        fd = layer.open_private(path, mountpoint=options.mountpoint)
        lowers.append(DirectoryLayer(fd, path, index=index, dialect=dialect, cache=cache))
        lowers[-1].data_only = index >= first_data_only
    if lowers:
        lowers[-1].bottom = True
    elif upper is not None:
        upper.layer.bottom = True
    _number(lowers, upper)
    tree_options = TreeOptions(
        metacopy=options.metacopy,
        redirect=options.redirect_dir,
        fsync=options.fsync and not options.volatile,
        caching=options.timeout_s is None,
        static_nlink=options.static_nlink,
        ino32=options.ino32,
        read_only=options.read_only,
    )
    return UnionTree([*lowers], upper, tree_options)


def _check_mountpoint(path: bytes) -> None:
    try:
        is_directory = os.path.isdir(path)
        os.stat(path)
    except OSError as error:
        msg = f"mount point {os.fsdecode(path)} cannot be used: {error.strerror}; make the directory first"
        raise SetupError(msg) from error
    if not is_directory:
        msg = f"mount point {os.fsdecode(path)} is not a directory: choose one"
        raise SetupError(msg)


def _check_distinct(options: MountOptions) -> None:
    if options.upper is None:
        return
    for path in options.lowers:
        with contextlib.suppress(OSError):
            if os.path.samefile(path, options.upper):
                msg = (
                    f"{os.fsdecode(path)} is both a lower and the upper directory: "
                    "what is written would change a layer; use another upperdir="
                )
                raise SetupError(msg)


def _work_directory(options: MountOptions) -> bytes:
    """The work directory that was named, or a hidden one beside the upper."""
    if options.work is not None:
        return options.work
    assert options.upper is not None  # only asked for an upper
    real = os.path.realpath(options.upper)
    work = os.path.join(os.path.dirname(real), b"." + os.path.basename(real) + _WORK_SUFFIX)
    try:
        os.makedirs(work, mode=0o700, exist_ok=True)
    except OSError as error:
        msg = (
            f"no work directory was named and {os.fsdecode(work)} cannot be made ({error.strerror}): "
            "name one with workdir="
        )
        raise SetupError(msg) from error
    return work


def _reading_dialect(options: MountOptions) -> Dialect:
    user = options.userxattr or not _reads_trusted()
    return Dialect(markers.USER_PREFIX if user else markers.TRUSTED_PREFIX)


def _reads_trusted() -> bool:
    """Whether trusted.* attributes are for us; root of a user namespace is refused (xattr(7))."""
    fd = os.memfd_create("mica-probe")
    try:
        os.setxattr(fd, markers.TRUSTED_PREFIX + b"mica.probe", b"y")
    except PermissionError:
        return False
    except OSError:  # a kernel whose files in memory have no attributes
        return os.geteuid() == 0
    else:
        return True
    finally:
        os.close(fd)


def _number(lowers: list[DirectoryLayer], upper: Upper | None) -> None:
    """Decide how inode numbers are derived: as they are on the main device, hashed on others."""
    main = upper.layer if upper is not None else lowers[0]
    for other in lowers:
        if other.device != main.device:
            fsid = os.statvfs(other.root.xattr_path(None)).f_fsid or other.device
            other.salt = (fsid * 0xD6E8FEB86659FD93) & ((1 << 62) - 1) | 1


def _serve_tree(
    options: MountOptions, tree: UnionTree, cache: FdCache, on_ready: Callable[[], None]
) -> None:
    started = trio.Event()
    replies = Replies(
        timeout_s=FOREVER_S if options.timeout_s is None else options.timeout_s,
        keep_cache=options.timeout_s is None,
        fsync=options.fsync and not options.volatile,
        xattrs=options.xattrs,
        max_write_bytes=options.max_write,
    )
    operations = UnionOperations(
        tree, cache, Owners(options), replies, on_init=started.set, use_acl=options.acl
    )
    tree.on_busy = _tick
    mountpoint = os.path.realpath(options.mountpoint)
    try:
        session = Session(operations, mountpoint, libfuse_options(options, euid=os.geteuid()))
    except RuntimeError as error:
        msg = (
            f"{os.fsdecode(mountpoint)} cannot be mounted: /dev/fuse or the mount was refused ({error}); "
            "is /dev/fuse there, and are you root or is fusermount3 installed?"
        )
        raise SetupError(msg) from error
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    os.chdir("/")
    try:
        trio.run(_run, session, operations, mountpoint, started, on_ready)
    finally:
        session.close(unmount=_is_ours(mountpoint))


async def _run(
    session: Session,
    operations: UnionOperations,
    mountpoint: bytes,
    started: trio.Event,
    on_ready: Callable[[], None],
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_announce, started, on_ready)
        nursery.start_soon(_obey_signals, session, operations, mountpoint)
        await session.serve()
        nursery.cancel_scope.cancel()


async def _announce(started: trio.Event, on_ready: Callable[[], None]) -> None:
    await started.wait()
    await (
        trio.lowlevel.checkpoint()
    )  # the reply to INIT is on its way once the handler has returned
    on_ready()


async def _obey_signals(session: Session, operations: UnionOperations, mountpoint: bytes) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as signals:
        async for number in signals:
            if number == signal.SIGUSR1:
                log.info("requests: %s", dict(operations.requests.most_common()))
                continue
            await trio.to_thread.run_sync(detach, mountpoint)
            with trio.move_on_after(_DETACH_GRACE_S):
                await trio.sleep_forever()  # `serve` returns when the last user has gone
            session.stop()


def detach(mountpoint: bytes) -> None:
    """Take the mount out of the tree; it ends when nobody uses it any more."""
    try:
        syscalls.unmount(mountpoint, syscalls.MNT_DETACH)
    except PermissionError:
        os.spawnvp(
            os.P_WAIT, "fusermount3", ["fusermount3", "-u", "-z", "--", os.fsdecode(mountpoint)]
        )
    except OSError as error:
        log.info("unmount: %s", error)


def _is_ours(mountpoint: bytes) -> bool:
    """Whether something is still mounted there, so that it has to be unmounted."""
    with open("/proc/self/mountinfo", "rb") as mounts:
        field = mountpoint.replace(b"\\", b"\\134").replace(b" ", b"\\040")
        field = field.replace(b"\n", b"\\012").replace(b"\t", b"\\011")
        return any(line.split(b" ")[4] == field and b" - fuse" in line for line in mounts)


def _tick(busy: int) -> None:
    """Let SIGALRM interrupt a stuck read of the device while a worker thread needs the interpreter."""
    if busy:
        signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    interval_s = _TICK_S if busy else 0.0
    signal.setitimer(signal.ITIMER_REAL, interval_s, interval_s)
