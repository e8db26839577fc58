"""The pyfuse3 adapter: translates requests into the tree's verbs and its answers back; decides nothing.

The one rule: nothing but `FUSEError` leaves a handler, since anything else would end the mount.  A bug costs one
EIO and one traceback in the log.

One request travels: pyfuse3 awaits a handler here -> `@request` counts it -> the tree's verb -> `_entry` fills
the reply.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from unionfs import acl, faults, handshake, syscalls
from unionfs.eager import eager_trio
from unionfs.inodes import Node
from unionfs.tree import Caller, Changes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from unionfs.inodes import DirNode
    from unionfs.layer import FdCache, Sheet
    from unionfs.owners import Owners
    from unionfs.tree import UnionTree

log = logging.getLogger("unionfs")

FOREVER_S = 1e9
_TRUSTED = b"trusted."
_UNKNOWN_INO = 0xFFFFFFFF  # fuse.h: FUSE_UNKNOWN_INO


@dataclass(slots=True)
class Listing:
    """An open directory: a snapshot of its names; a cookie is a place in it."""

    node: DirNode
    names: list[bytes]


@dataclass(frozen=True, slots=True)
class Replies:
    """How the kernel may use what it is told.

    Attributes:
        timeout_s: How long names and attributes stay true.
        keep_cache: File contents stay true from one open to the next.
        fsync: fsync requests are wanted at all.
        xattrs: Extended attributes are shown and stored.
        max_write_bytes: The largest write request; None for the default.
    """

    timeout_s: float = FOREVER_S
    keep_cache: bool = True
    fsync: bool = True
    xattrs: bool = True
    max_write_bytes: int | None = None


P = ParamSpec("P")
R = TypeVar("R")


def request(
    handler: Callable[Concatenate[UnionOperations, P], Coroutine[None, None, R]],
) -> Callable[Concatenate[UnionOperations, P], Coroutine[None, None, R]]:
    """Guard a handler: count it, and turn whatever it raises into one errno for the caller."""
    name = handler.__name__

    async def guarded(self: UnionOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.requests[name] += 1
        if len(self.cache) > self.cache.capacity:
            self.cache.trim()
        try:
            return await handler(self, *args, **kwargs)
        except OSError as error:
            if error.errno in _REPORTED:
                log.warning("%s: %s", name, error)
            raise FUSEError(error.errno or errno.EIO) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("%s%r failed", name, args)
            raise FUSEError(errno.EIO) from None

    guarded.__doc__ = handler.__doc__
    return guarded


def _is_news(record: logging.LogRecord) -> bool:
    """Not that an answer came too late: the kernel withdraws requests when it unmounts (ENOENT)."""
    return "fuse_reply_* failed" not in record.msg or record.args != (os.strerror(errno.ENOENT),)


_REPORTED = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE, errno.EBADF})


class BareEntry:
    """A listing's entry without attributes, for an inode that the kernel knows already.

    The kernel's protocol has it (`fuse_direntplus_link`: a node id of 0 means that attributes and reference are left
    out), but `EntryAttributes.st_ino` sets the node id and the inode number together; so the node id, the first field
    of libfuse's `struct fuse_entry_param`, is cleared in place.
    """

    _PROBE = 0x6D6963616D696361

    def __init__(self) -> None:
        """Find the two fields.

        Raises:
            LookupError: This build of pyfuse3 keeps them elsewhere; listings carry attributes then.
        """
        self._entry = EntryAttributes()
        self._entry.st_ino = self._PROBE
        cells = syscalls.cells_holding(self._entry, self._PROBE)
        if len(cells) != 2:  # node id and inode number
            msg = f"the inode number stands in {len(cells)} places"
            raise LookupError(msg)
        self._node_id = cells[0]
        self._node_id.value = 0
        if self._entry.st_ino != 0:  # the property reads the node id
            msg = "the first place is not the node id"
            raise LookupError(msg)

    def of(self, node: Node) -> EntryAttributes:
        """The entry for a node; valid until the next call."""
        entry = self._entry
        entry.st_ino = node.ino
        self._node_id.value = 0
        entry.st_mode = node.kind
        return entry

    def unknown(self) -> EntryAttributes:
        """The entry for something that cannot be looked at; valid until the next call."""
        entry = self._entry
        entry.st_ino = _UNKNOWN_INO
        self._node_id.value = 0
        entry.st_mode = 0
        return entry


def bare_entry() -> BareEntry | None:
    """A `BareEntry`, or None where pyfuse3 is built otherwise."""
    try:
        return BareEntry()
    except LookupError as error:
        log.info("listings of known entries carry attributes: %s", error)
        return None


class PlainEntries:
    """The short way to the plain files of a listing: one lstat each, through one descriptor per sheet.

    The reply is copied at once, so one `EntryAttributes` serves for all of them.
    """

    def __init__(self, tree: UnionTree, owners: Owners, timeout_s: float) -> None:
        """For the listings of `tree`."""
        self._tree = tree
        self._owners = owners
        self._entry = EntryAttributes()
        self._entry.entry_timeout = timeout_s
        self._entry.attr_timeout = timeout_s

    def sheets(self, directory: DirNode) -> list[tuple[Sheet, Callable[[bytes], os.stat_result]]]:
        """The sheets of a directory by place, the upper's last (place -1), for use within one request."""
        sheets = [*directory.sheets]
        if directory.upper_sheet is not None:
            sheets.append(directory.upper_sheet)
        return [(sheet, sheet.stats()) for sheet in sheets]

    def get(
        self,
        directory: DirNode,
        name: bytes,
        place: int,
        sheets: list[tuple[Sheet, Callable[[bytes], os.stat_result]]],
    ) -> tuple[Node, EntryAttributes] | None:
        """Node and reply for an entry that the kernel does not know; None when the long way must be gone."""
        sheet, lstat = sheets[place]
        if sheet.impure:
            return None
        try:
            st = lstat(name)
        except OSError:
            return None
        hit = self._tree.adopt_plain(directory, name, place, sheet, st)
        if hit is None:
            return None
        node = hit[0]
        entry, owners = self._entry, self._owners
        entry.st_ino = node.ino
        entry.st_mode = st.st_mode
        if owners.plain:
            entry.st_uid = st.st_uid
            entry.st_gid = st.st_gid
        else:
            entry.st_uid = owners.shown_uid(st.st_uid)
            entry.st_gid = owners.shown_gid(st.st_gid)
        entry.st_rdev = st.st_rdev
        entry.st_size = st.st_size
        entry.st_blocks = st.st_blocks
        entry.st_atime_ns = st.st_atime_ns
        entry.st_mtime_ns = st.st_mtime_ns
        entry.st_ctime_ns = st.st_ctime_ns
        return node, entry


class UnionOperations(pyfuse3.Operations):
    """Serves a tree to the kernel."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        tree: UnionTree,
        cache: FdCache,
        owners: Owners,
        replies: Replies,
        *,
        on_init: Callable[[], None],
        use_acl: bool,
    ) -> None:
        """Serve `tree`; `on_init` is called when the kernel has opened the conversation."""
        super().__init__()
        self.tree = tree
        self.cache = cache
        self.owners = owners
        self.replies = replies
        self.enable_acl = use_acl
        self.requests: Counter[str] = Counter()
        self._on_init = on_init
        logging.getLogger("pyfuse3").addFilter(_is_news)
        self._listings: dict[int, Listing] = {}
        self._files: dict[int, Node] = {}
        self._next_handle = 0
        self._bare = bare_entry()
        self._plain = PlainEntries(tree, owners, replies.timeout_s)
        self._nobody = Node(0, 0, tree.root, b"", None)  # stands for what cannot be looked at

    def init(self) -> None:
        """The kernel has opened the conversation; the answer goes out when this has returned."""
        device_fd = handshake.device_fd()
        if device_fd >= 0:
            handshake.Handshake(device_fd, max_write_bytes=self.replies.max_write_bytes)
        self._on_init()

    # --- replies -------------------------------------------------------------------------------------------------

    def _caller(self, ctx: RequestContext) -> Caller:
        return self.owners.caller(ctx.uid, ctx.gid, ctx.umask)

    def _entry(self, node: Node, st: os.stat_result) -> EntryAttributes:
        """The attributes of a node as the kernel wants them."""
        tree, owners = self.tree, self.owners
        entry = EntryAttributes()
        entry.st_ino = node.ino
        mode = st.st_mode
        entry.st_mode = mode
        entry.st_nlink = tree.link_count(node, st)
        if owners.plain:
            entry.st_uid = st.st_uid
            entry.st_gid = st.st_gid
        else:
            entry.st_uid = owners.shown_uid(st.st_uid)
            entry.st_gid = owners.shown_gid(st.st_gid)
        entry.st_rdev = st.st_rdev
        entry.st_size = st.st_size
        entry.st_blocks = st.st_blocks if node.data is None else tree.blocks(node, st)
        entry.st_atime_ns = st.st_atime_ns
        entry.st_mtime_ns = st.st_mtime_ns
        entry.st_ctime_ns = st.st_ctime_ns
        timeout_s = self.replies.timeout_s
        entry.entry_timeout = timeout_s
        entry.attr_timeout = timeout_s
        return entry

    def _counted(self, node: Node, st: os.stat_result) -> EntryAttributes:
        """A reply by which the kernel gains one reference to the node."""
        entry = self._entry(node, st)
        node.lookups += 1
        return entry

    def _handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    # --- names ---------------------------------------------------------------------------------------------------

    @request
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name; a reply without inode lets the kernel remember that there is none."""
        del ctx
        tree = self.tree
        hit = tree.lookup(tree.directory(parent_inode), name)
        if hit is None:
            entry = EntryAttributes()
            entry.st_ino = 0
            entry.entry_timeout = self.replies.timeout_s
            return entry
        return self._counted(*hit)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel drops references; there is no reply, so nothing may be raised."""
        for ino, count in inode_list:
            try:
                self.tree.forget(ino, count)
            except Exception:
                log.exception("forget of inode %d failed", ino)

    @request
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a file that is not to be opened, a device, a FIFO or a socket."""
        parent = self.tree.directory(parent_inode)
        return self._counted(*self.tree.mknod(parent, name, mode, rdev, self._caller(ctx)))

    @request
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        parent = self.tree.directory(parent_inode)
        return self._counted(*self.tree.mkdir(parent, name, mode, self._caller(ctx)))

    @request
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symbolic link."""
        parent = self.tree.directory(parent_inode)
        return self._counted(*self.tree.symlink(parent, name, target, self._caller(ctx)))

    @request
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Give a file a further name."""
        del ctx
        node = self.tree.node(inode)
        st = await self.tree.link(node, self.tree.directory(new_parent_inode), new_name)
        return self._counted(node, st)

    @request
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name that is no directory."""
        del ctx
        await self.tree.unlink(self.tree.directory(parent_inode), name)

    @request
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        del ctx
        self.tree.rmdir(self.tree.directory(parent_inode), name)

    @request
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename or exchange."""
        del ctx
        tree = self.tree
        old_parent, new_parent = tree.directory(parent_inode_old), tree.directory(parent_inode_new)
        await tree.rename(old_parent, name_old, new_parent, name_new, flags)

    @request
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Target of a symbolic link."""
        del ctx
        return self.tree.readlink(self.tree.node(inode))

    # --- metadata ------------------------------------------------------------------------------------------------

    @request
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Metadata of an inode."""
        del ctx
        tree = self.tree
        node = tree.node(inode)
        entry = self._entry(node, tree.stat(node))
        if node is tree.root:
            entry.st_ino = tree.root_number
        return entry

    @request
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Change metadata."""
        del fh, ctx
        node = self.tree.node(inode)
        owners = self.owners
        changes = Changes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=owners.disk_uid(attr.st_uid) if fields.update_uid else None,
            gid=owners.disk_gid(attr.st_gid) if fields.update_gid else None,
            size_bytes=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        entry = self._entry(node, await self.tree.setattr(node, changes))
        if node is self.tree.root:
            entry.st_ino = self.tree.root_number
        return entry

    @request
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Value of an attribute."""
        del ctx
        self._check_xattrs(name)
        value = self.tree.getxattr(self.tree.node(inode), name)
        return acl.translate(value, self.owners.shown_acl_id) if acl.is_acl(name) else value

    @request
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an attribute."""
        self._check_xattrs(name)
        tree, node = self.tree, self.tree.node(inode)
        if acl.is_acl(name):
            value = acl.translate(value, self.owners.disk_acl_id)
        await tree.setxattr(node, name, value)
        if name == acl.ACCESS and ctx.uid != 0:
            await self._strip_set_group_id(node, ctx)

    async def _strip_set_group_id(self, node: Node, ctx: RequestContext) -> None:
        """An ACL set by somebody outside the file's group takes set-group-id away (posix_acl_update_mode)."""
        st = self.tree.stat(node)
        if not st.st_mode & stat.S_ISGID or node.is_directory:
            return
        if self._is_outside(st.st_gid, ctx):
            await self.tree.setattr(node, Changes(mode=st.st_mode & ~stat.S_ISGID))

    @request
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        """Names of the attributes; `trusted.` ones for root alone (xattr(7))."""
        self._check_xattrs()
        names = self.tree.listxattr(self.tree.node(inode))
        if not self.enable_acl:
            names = [name for name in names if not acl.is_acl(name)]
        if ctx.uid != 0:
            return [name for name in names if not name.startswith(_TRUSTED)]
        return names

    @request
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an attribute."""
        del ctx
        self._check_xattrs(name)
        try:
            await self.tree.removexattr(self.tree.node(inode), name)
        except OSError as error:
            # Removing an ACL that is not there succeeds (vfs_remove_acl).
            if error.errno != errno.ENODATA or not acl.is_acl(name):
                raise

    def _check_xattrs(self, name: bytes = b"") -> None:
        if not self.replies.xattrs:
            raise FUSEError(errno.ENOSYS)  # the kernel stops asking and answers EOPNOTSUPP itself
        if not self.enable_acl and acl.is_acl(name):
            raise FUSEError(errno.EOPNOTSUPP)

    @request
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Permission is the kernel's business (default_permissions)."""
        del inode, mode, ctx
        return True

    @request
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        """Space and limits."""
        del ctx
        st = self.tree.statfs()
        reply = pyfuse3.StatvfsData()
        for field in _STATFS_FIELDS:
            setattr(reply, field, getattr(st, field))
        reply.f_namemax = 255
        return reply

    # --- directories ---------------------------------------------------------------------------------------------

    @request
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory; its names are read with the first listing request."""
        del ctx
        handle = self._handle()
        self._listings[handle] = Listing(self.tree.directory(inode), [])
        return handle

    @request
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List from the cookie `start_id` on; 0 takes a new snapshot (rewinddir(3))."""
        listing = self._listings[fh]
        node, tree = listing.node, self.tree
        if start_id == 0:
            listing.names = [b".", b"..", *tree.names(node)]
        names, entries = listing.names, node.entries
        reply, bare = pyfuse3.readdir_reply, self._bare if tree.options.caching else None
        plain, sheets = self._plain, self._plain.sheets(node)
        for place in range(start_id, len(names)):
            name = names[place]
            if place < 2:  # "." and ".." come first, and the kernel counts no reference
                if not reply(token, name, self._dot(node, name), place + 1):
                    return
                continue
            there = entries.get(name)
            if bare is not None and isinstance(there, Node):
                if not reply(token, name, bare.of(there), place + 1):
                    return
                continue
            hit = (
                plain.get(node, name, there, sheets)
                if isinstance(there, int) and there >= -1
                else None
            )
            if hit is None:
                hit = self._listed(node, name)
                if hit is None:
                    continue
            if not reply(token, name, hit[1], place + 1):
                tree.forget(hit[0].ino, 0)
                return
            hit[0].lookups += 1

    def _listed(self, parent: DirNode, name: bytes) -> tuple[Node, EntryAttributes] | None:
        """Node and reply for an entry; what cannot be shown is listed all the same: the error is its own."""
        try:
            found = self.tree.entry(parent, name)
            return None if found is None else (found[0], self._entry(*found))
        except OSError as error:
            log.warning("readdir: %s", error)
            return None if self._bare is None else (self._nobody, self._bare.unknown())

    def _dot(self, node: DirNode, name: bytes) -> EntryAttributes:
        there = node.parent or node if name == b".." else node
        entry = EntryAttributes()
        entry.st_ino = self.tree.shown_ino(there)
        entry.st_mode = stat.S_IFDIR
        return entry

    @request
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        del self._listings[fh]

    @request
    async def fsyncdir(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        """Make the entries of a directory durable."""
        del datasync
        self._check_fsync()
        await self.tree.sync_directory(self._listings[fh].node)

    # --- files ---------------------------------------------------------------------------------------------------

    @request
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a regular file."""
        node = self.tree.node(inode)
        await self.tree.open(node, flags, drops=self._dropped_by(node, flags, ctx))
        handle = self._handle()
        self._files[handle] = node
        return FileInfo(fh=handle, keep_cache=self.replies.keep_cache)

    def _dropped_by(self, node: Node, flags: int, ctx: RequestContext) -> int:
        """The privileges that a truncating open takes from a file (setattr_should_drop_suidgid)."""
        if not flags & os.O_TRUNC or ctx.uid == 0:
            return 0
        st = self.tree.stat(node)
        if st.st_mode & stat.S_IXGRP or self._is_outside(st.st_gid, ctx):
            return stat.S_ISUID | stat.S_ISGID
        return stat.S_ISUID

    def _is_outside(self, disk_gid: int, ctx: RequestContext) -> bool:
        """Whether the caller is in no way a member of a file's group."""
        gid = self.owners.shown_gid(disk_gid)
        return gid != ctx.gid and gid not in pyfuse3.get_sup_groups(ctx.pid)

    @request
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make and open a regular file."""
        del flags
        parent = self.tree.directory(parent_inode)
        node, st = self.tree.create(parent, name, mode, self._caller(ctx))
        assert node.file is not None  # create opens it
        node.file.users += 1
        handle = self._handle()
        self._files[handle] = node
        return FileInfo(fh=handle, keep_cache=self.replies.keep_cache), self._counted(node, st)

    @request
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; short only at the end of the file."""
        file = self._files[fh].file
        assert file is not None  # it has a handle
        return os.pread(file.fd, size, off)

    @request
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write."""
        file = self._files[fh].file
        assert file is not None  # it has a handle
        written = os.pwrite(file.fd, buf, off)
        faults.point("write.done")
        return written

    @request
    async def flush(self, fh: int) -> None:
        """Nothing waits for close(2) here; the kernel stops asking."""
        del fh
        raise FUSEError(errno.ENOSYS)

    @request
    async def release(self, fh: int) -> None:
        """Close one handle."""
        self.tree.release(self._files.pop(fh))

    @request
    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        """Make the contents of a file durable."""
        self._check_fsync()
        await self.tree.sync_file(self._files[fh], data_only=datasync)

    def _check_fsync(self) -> None:
        if not self.replies.fsync:
            raise FUSEError(errno.ENOSYS)  # the kernel stops asking and succeeds by itself


_STATFS_FIELDS = (
    "f_bsize",
    "f_frsize",
    "f_blocks",
    "f_bfree",
    "f_bavail",
    "f_files",
    "f_ffree",
    "f_favail",
)


class Session:
    """The conversation with the kernel; one per process, as pyfuse3 has it."""

    def __init__(
        self, operations: UnionOperations, mountpoint: bytes, options: frozenset[str]
    ) -> None:
        """Mount.

        Raises:
            RuntimeError: The kernel or fusermount3 refused.
        """
        is_busy = operations.tree.is_busy
        setattr(pyfuse3, "trio", eager_trio(is_busy))  # noqa: B010 - its stub does not tell of it
        pyfuse3.init(operations, os.fsdecode(mountpoint), set(options))

    async def serve(self) -> None:
        """Answer requests until the file system is unmounted, or `stop` is called."""
        try:
            await pyfuse3.main()
        except* OSError as errors:
            # An aborted connection (umount -f, /sys/fs/fuse/connections) is an end like any other.
            ended, others = errors.split(
                lambda error: getattr(error, "errno", 0) == errno.ECONNABORTED
            )
            if others is not None:
                raise others from None
            log.info("the connection was aborted: %s", ended)

    def stop(self) -> None:
        """Let `serve` return."""
        pyfuse3.terminate()

    def close(self, *, unmount: bool) -> None:
        """Close the device, and unmount if that is still to be done."""
        pyfuse3.close(unmount=unmount)
