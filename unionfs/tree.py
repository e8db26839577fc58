"""The verbs that change a union of layers; raises `OSError`, knows no FUSE.

Every change goes to the upper layer and is published by one system call.  Verbs that may copy much data are
`async`: they copy in a worker thread and re-check what they knew afterwards.  Everything else is synchronous, so
that between two awaits the tree is consistent.

Source: POSIX.1-2017 for the errors; Linux Documentation/filesystems/overlayfs.rst for what a union does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from unionfs import copyup, faults, markers, syscalls
from unionfs.errors import ReadOnlyStackError, StaleNodeError, UnionError
from unionfs.inodes import Data, DirNode, Node, OpenFile, derive
from unionfs.layer import DirectorySheet
from unionfs.resolve import Verdict
from unionfs.view import NAME_MAX, TreeOptions, UnionView, join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from unionfs.layer import Layer, Sheet
    from unionfs.upper import Upper

_INLINE_COPY_BYTES = 1 << 20
_ACL_ACCESS = b"system.posix_acl_access"
_ACL_DEFAULT = "system.posix_acl_default"
_CAPABILITY = "security.capability"
_RENAME_FLAGS = syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a request runs, in ids as they are kept on disk."""

    uid: int
    gid: int
    umask: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """What a setattr changes; None leaves a field as it is. Ids as they are kept on disk, times in ns."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class UnionTree(UnionView):
    """A union of layers that can be written to."""

    def __init__(self, lowers: list[Layer], upper: Upper | None, options: TreeOptions) -> None:
        """Stack `lowers`, topmost first, under `upper`; the tree takes them over."""
        super().__init__(lowers, upper, options)
        self._copy_limiter = trio.CapacityLimiter(4)
        self._self = Caller(os.geteuid(), os.getegid())
        self._threads = 0
        self.on_busy: Callable[[int], None] = lambda _threads: None

    # --- acting for a caller -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _acting_for(self, caller: Caller) -> Iterator[None]:
        """Let new objects belong to `caller`, and its umask apply to them (unless a default ACL does).

        Only the ids for new objects change: the process keeps its privileges (SECBIT_NO_SETUID_FIXUP).
        """
        own = caller.uid == self._self.uid and caller.gid == self._self.gid
        if not own:
            syscalls.setfsgid(caller.gid)
            syscalls.setfsuid(caller.uid)
        umask = os.umask(caller.umask)
        try:
            yield
        finally:
            os.umask(umask)
            if not own:
                syscalls.setfsuid(self._self.uid)
                syscalls.setfsgid(self._self.gid)

    def _writable(self) -> Upper:
        if self.upper is None or self.options.read_only:
            raise ReadOnlyStackError
        return self.upper

    def is_busy(self) -> bool:
        """Whether a worker thread copies or syncs just now."""
        return self._threads > 0

    async def _in_thread(self, work: Callable[[], None]) -> None:
        """Run blocking work beside the event loop; a mount that ends waits for it."""
        self._threads += 1
        if self._threads == 1:
            self.on_busy(1)
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(work, limiter=self._copy_limiter)
        finally:
            self._threads -= 1
            if self._threads == 0:
                self.on_busy(0)

    # --- copy-up -------------------------------------------------------------------------------------------------

    def ensure_upper(self, directory: DirNode) -> DirectorySheet:
        """The upper sheet of a directory, copied up with its parents if need be.

        Raises:
            OSError: EROFS without an upper layer; ENOENT when the directory was removed; ENOSPC ...
        """
        self._writable()
        if directory.dead:
            raise UnionError(errno.ENOENT)
        chain: list[DirNode] = []
        above: DirNode | None = directory
        while above is not None and above.upper_sheet is None:
            chain.append(above)
            above = above.parent
        if above is None:
            raise StaleNodeError(directory.ino)
        for node in reversed(chain):
            self._copy_up_directory(node)
        assert directory.upper_sheet is not None  # just made
        return directory.upper_sheet

    def _copy_up_directory(self, node: DirNode) -> None:
        upper, parent = self._writable(), node.parent
        if parent is None or parent.upper_sheet is None:
            raise StaleNodeError(node.ino)
        lower = node.sheets[0]
        st = lower.stat_self()
        with upper.staged() as staged:
            copyup.make_special(st, None, upper.work_fd, staged)
            self._finish_staged(st, lower.xattr_path(None), staged)
            faults.point("copyup.staged")
            with self._times_kept(parent):
                os.rename(
                    staged,
                    node.name,
                    src_dir_fd=upper.work_fd,
                    dst_dir_fd=parent.upper_sheet.fd(),
                )
        faults.point("copyup.published")
        node.upper_sheet = parent.upper_sheet.child(node.name)

    def _copy_up_removed(self, node: DirNode) -> None:
        """Give a removed directory that is still in use an upper directory without a name."""
        upper = self._writable()
        if node.upper_sheet is not None:
            return
        lower = node.sheets[0]
        with upper.staged() as staged:
            copyup.make_special(lower.stat_self(), None, upper.work_fd, staged)
            self._finish_staged(lower.stat_self(), lower.xattr_path(None), staged)
            fd = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper.work_fd)
            os.rmdir(staged, dir_fd=upper.work_fd)
        node.upper_sheet = DirectorySheet(upper.layer, None, b"")
        node.upper_sheet.adopt_fd(fd)

    def _finish_staged(self, st: os.stat_result, source: bytes, staged: bytes) -> None:
        upper = self._writable()
        copyup.copy_metadata(
            st, source, upper.staged_path(staged), dir_fd=upper.work_fd, name=staged
        )
        copyup.copy_times(st, dir_fd=upper.work_fd, name=staged)

    @contextlib.contextmanager
    def _times_kept(self, parent: DirNode) -> Iterator[None]:
        """Publish a copy-up in `parent` without its users seeing the directory change."""
        assert parent.upper_sheet is not None  # callers have made it
        fd = parent.upper_sheet.fd()
        st = os.fstat(fd)
        yield
        os.utime(b"/proc/self/fd/%d" % fd, ns=(st.st_atime_ns, st.st_mtime_ns))

    async def copy_up(self, node: Node, *, data: bool, size_bytes: int | None = None) -> None:
        """Give a node an upper file (or directory), with its parents; nothing happens when it has one.

        Args:
            data: The contents are about to change; without, metadata alone may be copied.
            size_bytes: Copy only this many bytes (O_TRUNC passes 0); None copies all.

        Raises:
            OSError: EROFS without an upper layer; ENOSPC, EDQUOT, EIO ...
        """
        upper = self._writable()
        while node.copying is not None:
            await node.copying.wait()
        if isinstance(node, DirNode):
            if node.dead:
                self._copy_up_removed(node)
            else:
                self.ensure_upper(node)
            return
        if node.upper:
            if data and node.data is not None:
                await self._fill_metacopy(node, size_bytes)
            return
        for parent, _ in node.names():
            self.ensure_upper(parent)
        with upper.staged() as staged:
            metacopy = await self._stage(node, staged, data=data, size_bytes=size_bytes)
            faults.point("copyup.staged")
            self._publish(node, staged, metacopy=metacopy)
        faults.point("copyup.done")

    async def _stage(
        self, node: Node, staged: bytes, *, data: bool, size_bytes: int | None
    ) -> bool:
        """Make a complete copy of a lower object in the staging directory; True for metadata alone."""
        upper, lower = self._writable(), node.sheet
        if lower is None:
            raise StaleNodeError(node.ino)
        st = lower.lstat(node.lower_name)
        source = lower.xattr_path(node.lower_name)
        metacopy = False
        if node.kind == stat.S_IFREG:
            metacopy = (
                not data and st.st_size > 0 and self.options.metacopy and self._can_metacopy()
            )
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(staged, flags, 0o600, dir_fd=upper.work_fd)
            try:
                if metacopy:
                    os.ftruncate(fd, st.st_size)
                else:
                    await self._copy_contents(node, fd, st, size_bytes)
            finally:
                os.close(fd)
            source = lower.xattr_path(node.lower_name)  # the descriptor may have changed meanwhile
        else:
            target = lower.readlink(node.lower_name) if node.kind == stat.S_IFLNK else None
            copyup.make_special(st, target, upper.work_fd, staged)
        self._finish_staged(st, source, staged)
        path = upper.staged_path(staged)
        upper.write_origin(path, node.number)
        if metacopy:
            os.setxattr(path, upper.dialect.name("metacopy"), b"")
            if node.lower_name != node.name or st.st_nlink > 1:
                upper.set_redirect(path, join(lower.path(), node.lower_name))
        return metacopy

    def _can_metacopy(self) -> bool:
        return self._writable().dialect.xattrs

    async def _copy_contents(
        self, node: Node, fd: int, st: os.stat_result, size_bytes: int | None
    ) -> None:
        """Copy the data of a lower file into `fd`, beside the event loop when it is much."""
        count = st.st_size if size_bytes is None else min(size_bytes, st.st_size)
        source = self._open_lower_data(node) if count else -1
        durable = self.options.fsync and count > 0

        def work() -> None:
            copyup.copy_data(source, fd, count, whole=count == st.st_size)
            if durable:
                os.fsync(fd)

        try:
            if count <= _INLINE_COPY_BYTES:
                if count:
                    work()
                return
            node.copying = trio.Event()
            try:
                await self._in_thread(work)
            finally:
                node.copying.set()
                node.copying = None
        finally:
            if source >= 0:
                os.close(source)

    def _open_lower_data(self, node: Node) -> int:
        if node.data is not None:
            return open_quietly(node.data.sheet.open, node.data.name, os.O_RDONLY)
        if node.sheet is None:
            raise StaleNodeError(node.ino)
        return open_quietly(node.sheet.open, node.lower_name, os.O_RDONLY)

    def _publish(self, node: Node, staged: bytes, *, metacopy: bool) -> None:
        """Put a finished copy in the node's place and let everything that is open use it."""
        upper, lower = self._writable(), node.sheet
        assert lower is not None  # only lower nodes are copied up
        data = self._data_below(node, lower) if metacopy else None
        st = os.stat(staged, dir_fd=upper.work_fd, follow_symlinks=False)
        if not node.names():
            node.orphan_fd = open_path(staged, upper.work_fd)
            os.unlink(staged, dir_fd=upper.work_fd)
        else:
            try:
                self._publish_names(node, staged, lower.lstat(node.lower_name).st_nlink)
            except OSError:
                if not node.indexed or self._take_back(node, staged):
                    raise
                upper.discard(staged)  # names that could not be entered are found through the index
        faults.point("copyup.published")
        node.sheet, node.host_ino = None, st.st_ino
        node.data = data
        self._reopen(node)

    @staticmethod
    def _data_below(node: Node, lower: Sheet) -> Data:
        below = join(lower.path(), node.lower_name)
        if node.data is not None:
            return Data(node.data.sheet, node.data.name, below)
        return Data(lower, node.lower_name, below)

    def _publish_names(self, node: Node, staged: bytes, links: int) -> None:
        if links > 1:
            self._index(node, staged, links)
        for place, (parent, name) in enumerate(node.names()):
            self._publish_name(node, parent, name, staged, last=place == len(node.names()) - 1)

    def _take_back(self, node: Node, staged: bytes) -> bool:
        """Take a copy out of the index again; False when it was published under a name already."""
        upper = self._writable()
        try:
            published = os.stat(staged, dir_fd=upper.work_fd, follow_symlinks=False).st_nlink > 2
        except FileNotFoundError:
            published = True  # the last name is the staged one, renamed
        if not published:
            upper.drop_index(upper.index_name(node.ino))
            node.indexed, node.standing = False, 0
        return not published

    def _publish_name(
        self, node: Node, parent: DirNode, name: bytes, staged: bytes, *, last: bool
    ) -> None:
        upper = self._writable()
        sheet = self.ensure_upper(parent)
        upper.make_impure(sheet)
        parent.impure = True
        with self._times_kept(parent):
            if last:
                os.rename(staged, name, src_dir_fd=upper.work_fd, dst_dir_fd=sheet.fd())
            else:
                os.link(staged, name, src_dir_fd=upper.work_fd, dst_dir_fd=sheet.fd())
        if node.indexed:
            node.standing -= 1
            upper.write_standing(upper.index_name(node.number), node.standing)

    def _index(self, node: Node, staged: bytes, links: int) -> None:
        """Enter the copy of a hard-linked file in the index, so that its other names find it."""
        upper = self._writable()
        if not upper.dialect.xattrs:
            return
        name = upper.index_name(node.number)
        path = upper.staged_path(staged)
        with contextlib.suppress(PermissionError):
            value = markers.pack_nlink(links)
            os.setxattr(path, upper.dialect.name("nlink"), value, follow_symlinks=False)
        os.link(
            staged,
            name,
            src_dir_fd=upper.work_fd,
            dst_dir_fd=upper.links_fd,
            follow_symlinks=False,
        )
        upper.indexed.add(name)
        node.indexed, node.standing = True, links
        faults.point("copyup.indexed")

    async def _fill_metacopy(self, node: Node, size_bytes: int | None) -> None:
        """Give a metadata-only copy its data."""
        alone = node.parent is not None and not node.indexed
        if alone and self._stat_by_name(node).st_nlink == 1:
            with self._writable().staged() as staged:
                await self._replace_metacopy(node, staged, size_bytes)
        else:
            await self._fill_in_place(node, size_bytes)

    async def _replace_metacopy(self, node: Node, staged: bytes, size_bytes: int | None) -> None:
        """Put a whole copy in the place of a metadata-only one, in one step."""
        upper = self._writable()
        fd = os.open(staged, _CREATE_FLAGS, 0o600, dir_fd=upper.work_fd)
        try:
            await self._copy_contents(node, fd, self._stat_by_name(node), size_bytes)
            st = os.fstat(fd)
        finally:
            os.close(fd)
        source, follow = self.xattr_path(node)
        self._finish_staged(self._stat_by_name(node), source + (b"/." if follow else b""), staged)
        upper.write_origin(upper.staged_path(staged), node.number)
        faults.point("copyup.staged")
        if node.parent is None:  # it was removed while the data was copied
            os.close(node.orphan_fd)
            node.orphan_fd = open_path(staged, upper.work_fd)
            os.unlink(staged, dir_fd=upper.work_fd)
        else:
            with self._times_kept(node.parent):
                _, dir_fd, name = self.location(node)
                os.rename(staged, name, src_dir_fd=upper.work_fd, dst_dir_fd=dir_fd)
        faults.point("copyup.published")
        node.data, node.host_ino = None, st.st_ino
        self._reopen(node)

    async def _fill_in_place(self, node: Node, size_bytes: int | None) -> None:
        """Copy the data below a hard-linked metadata-only copy into it; the marker goes last.

        Until then a crash leaves the metadata-only copy, and a note in the staging directory of the times that it had.
        """
        upper = self._writable()
        path, follow = self.xattr_path(node)
        fd = _open_upper(path, os.O_RDWR, follow=follow)
        try:
            before = os.fstat(fd)
            with upper.times_noted(node.number, fd):
                await self._copy_contents(node, fd, before, size_bytes)
                faults.point("copyup.data-in-place")
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
                self._clear_metacopy(node, fd)
        finally:
            os.close(fd)
        faults.point("copyup.metacopy-cleared")

    def _clear_metacopy(self, node: Node, fd: int) -> None:
        dialect = self._writable().dialect
        os.removexattr(fd, dialect.name("metacopy"))
        with contextlib.suppress(OSError):  # ENODATA: it never moved
            os.removexattr(fd, dialect.name("redirect"))
        node.data = None
        self._reopen(node)

    def _reopen(self, node: Node) -> None:
        """After a copy-up: what was opened below reads from the upper file from now on."""
        file = node.file
        if file is None or node.data is not None:
            return
        path, follow = self.xattr_path(node)
        fd = _open_upper(path, os.O_RDONLY, follow=follow)
        os.dup2(fd, file.fd, inheritable=False)
        os.close(fd)

    async def _in_upper_at(self, node: Node, parent: DirNode, name: bytes) -> None:
        """Make sure that the upper layer has the node under this very name, metadata at least."""
        await self.copy_up(node, data=False)
        if not node.indexed:
            return
        upper = self._writable()
        sheet = self.ensure_upper(parent)
        if sheet.has_entry(name):
            return
        upper.make_impure(sheet)
        parent.impure = True
        with self._times_kept(parent):
            os.link(
                upper.index_name(node.number),
                name,
                src_dir_fd=upper.links_fd,
                dst_dir_fd=sheet.fd(),
                follow_symlinks=False,
            )
        node.standing -= 1
        upper.write_standing(upper.index_name(node.number), node.standing)

    # --- making entries ------------------------------------------------------------------------------------------

    def _check_new(self, parent: DirNode, name: bytes) -> DirectorySheet:
        """The upper sheet in which `name` may be made.

        Raises:
            OSError: EROFS, ENAMETOOLONG, EINVAL for a name that would read as a marker, EEXIST, ENOENT.
        """
        self._writable()
        if len(name) > NAME_MAX:
            raise UnionError(errno.ENAMETOOLONG)
        if markers.is_marker_name(name):
            raise UnionError(errno.EINVAL)
        if parent.dead:
            raise UnionError(errno.ENOENT)
        if self.lookup(parent, name) is not None:
            raise UnionError(errno.EEXIST)
        return self.ensure_upper(parent)

    @contextlib.contextmanager
    def _nursery_for(self, parent: DirNode) -> Iterator[tuple[int, bytes]]:
        """A directory in which a staged object inherits what it would in `parent`: (descriptor, name).

        Group and default ACL come from the directory an object is made in (mkdir(2), acl(5)); the staging
        directory has neither.
        """
        upper, sheet = self._writable(), self.ensure_upper(parent)
        acl = markers.get_xattr(sheet.xattr_path(None), _ACL_DEFAULT)
        st = sheet.stat_self()
        with upper.staged() as staged:
            if acl is None and not st.st_mode & stat.S_ISGID:
                yield upper.work_fd, staged
                upper.discard(staged)
                return
            os.mkdir(staged, 0o700, dir_fd=upper.work_fd)
            os.chown(staged, -1, st.st_gid, dir_fd=upper.work_fd)
            os.chmod(staged, 0o700 | (st.st_mode & stat.S_ISGID), dir_fd=upper.work_fd)
            if acl is not None:
                os.setxattr(upper.staged_path(staged), _ACL_DEFAULT, acl)
            fd = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper.work_fd)
            try:
                yield fd, b"new"
            finally:
                os.close(fd)
            upper.discard(staged)

    def _enter_new(self, parent: DirNode, name: bytes, st: os.stat_result) -> Node:
        """The node of an object that was just made in the upper layer."""
        upper = self._writable()
        kind = stat.S_IFMT(st.st_mode)
        number = derive(upper.layer, st.st_ino)
        node: Node
        if kind == stat.S_IFDIR:
            node = DirNode(number, parent, name)
        else:
            node = Node(number, kind, parent, name, None)
        node.host_ino = st.st_ino
        if isinstance(node, DirNode):
            assert parent.upper_sheet is not None  # it was made there
            node.upper_sheet = parent.upper_sheet.child(name)
            node.complete = True
            parent.subdirectories += 1
        self.table.add(node, upper.layer, upper=True)
        parent.set_entry(name, node)
        self._after_making(parent, name)
        return node

    def _after_making(self, parent: DirNode, name: bytes) -> None:
        """Where whiteouts are `.wh.` files: the name is no longer hidden."""
        upper = self._writable()
        if not upper.dialect.devices and parent.sheets and parent.upper_sheet is not None:
            upper.clear_aufs_whiteout(parent.upper_sheet, name)

    def create(
        self, parent: DirNode, name: bytes, mode: int, caller: Caller
    ) -> tuple[Node, os.stat_result]:
        """Make a regular file and open it for reading and writing.

        Raises:
            OSError: EEXIST, ENOENT (the directory was removed), EROFS, ENOSPC ...
        """
        sheet = self._check_new(parent, name)
        mode = stat.S_IMODE(mode)
        try:
            with self._acting_for(caller):
                fd = os.open(name, _CREATE_FLAGS, mode, dir_fd=sheet.fd())
        except FileExistsError:
            fd = self._create_over_whiteout(parent, name, mode, caller)
        faults.point("create.done")
        st = os.fstat(fd)
        node = self._enter_new(parent, name, st)
        node.file = OpenFile(fd, writable=True)
        return node, st

    def _create_over_whiteout(self, parent: DirNode, name: bytes, mode: int, caller: Caller) -> int:
        with self._nursery_for(parent) as (dir_fd, staged):
            with self._acting_for(caller):
                fd = os.open(staged, _CREATE_FLAGS, mode, dir_fd=dir_fd)
            try:
                faults.point("create.staged")
                sheet = self.ensure_upper(parent)
                os.rename(staged, name, src_dir_fd=dir_fd, dst_dir_fd=sheet.fd())
            except BaseException:
                os.close(fd)
                raise
        return fd

    def _make(
        self, parent: DirNode, name: bytes, caller: Caller, make: Callable[[bytes, int], None]
    ) -> tuple[Node, os.stat_result]:
        """Make an object that is no directory, in place or, over a whiteout, by way of the staging directory."""
        sheet = self._check_new(parent, name)
        try:
            with self._acting_for(caller):
                make(name, sheet.fd())
        except FileExistsError:
            with self._nursery_for(parent) as (dir_fd, staged):
                with self._acting_for(caller):
                    make(staged, dir_fd)
                faults.point("create.staged")
                sheet = self.ensure_upper(parent)
                os.rename(staged, name, src_dir_fd=dir_fd, dst_dir_fd=sheet.fd())
        faults.point("create.done")
        st = sheet.lstat(name)
        return self._enter_new(parent, name, st), st

    def mknod(
        self, parent: DirNode, name: bytes, mode: int, rdev: int, caller: Caller
    ) -> tuple[Node, os.stat_result]:
        """Make a regular file, device, FIFO or socket.

        Raises:
            OSError: EPERM for a character device 0:0, which would be a whiteout; as `create`.
        """
        if stat.S_ISCHR(mode) and rdev == 0:
            raise UnionError(errno.EPERM)
        return self._make(parent, name, caller, lambda at, fd: os.mknod(at, mode, rdev, dir_fd=fd))

    def symlink(
        self, parent: DirNode, name: bytes, target: bytes, caller: Caller
    ) -> tuple[Node, os.stat_result]:
        """Make a symbolic link to `target`."""
        return self._make(parent, name, caller, lambda at, fd: os.symlink(target, at, dir_fd=fd))

    def mkdir(
        self, parent: DirNode, name: bytes, mode: int, caller: Caller
    ) -> tuple[Node, os.stat_result]:
        """Make a directory; over a whiteout it becomes opaque."""
        sheet = self._check_new(parent, name)
        mode = stat.S_IMODE(mode)
        upper = self._writable()
        try:
            if not upper.dialect.devices and parent.sheets and sheet.has_aufs_whiteout(name):
                raise FileExistsError  # noqa: TRY301 - hidden by `.wh.NAME`: it must appear opaque
            with self._acting_for(caller):
                os.mkdir(name, mode, dir_fd=sheet.fd())
        except FileExistsError:
            self._mkdir_over_whiteout(parent, name, mode, caller)
        faults.point("mkdir.done")
        st = sheet.lstat(name)
        return self._enter_new(parent, name, st), st

    def _mkdir_over_whiteout(self, parent: DirNode, name: bytes, mode: int, caller: Caller) -> None:
        upper = self._writable()
        with self._nursery_for(parent) as (dir_fd, staged):
            with self._acting_for(caller):
                os.mkdir(staged, mode, dir_fd=dir_fd)
            made = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
            try:
                upper.make_opaque(b"/proc/self/fd/%d/." % made, made)
            finally:
                os.close(made)
            faults.point("mkdir.staged")
            sheet = self.ensure_upper(parent)
            if upper.has_whiteout(sheet, name):
                syscalls.renameat2(dir_fd, staged, sheet.fd(), name, syscalls.RENAME_EXCHANGE)
            else:
                os.rename(staged, name, src_dir_fd=dir_fd, dst_dir_fd=sheet.fd())

    async def link(self, node: Node, parent: DirNode, name: bytes) -> os.stat_result:
        """Give a file a further name.

        Raises:
            OSError: EEXIST, ENOENT when the file has no name left, EMLINK, EROFS ...
        """
        self._check_new(parent, name)
        if node.dead and not node.names():
            raise UnionError(errno.ENOENT)
        await self.copy_up(
            node, data=True
        )  # a metacopy with two names could not get its data in one step
        sheet = self._check_new(parent, name)
        self._before_moving_file(node, parent)
        faults.point("link.prepared")
        if node.orphan_fd >= 0:
            self._publish_link(lambda at, fd: syscalls.link_fd(node.orphan_fd, fd, at), sheet, name)
        else:
            _, from_fd, from_name = self.location(node)
            self._publish_link(
                lambda at, fd: os.link(
                    from_name, at, src_dir_fd=from_fd, dst_dir_fd=fd, follow_symlinks=False
                ),
                sheet,
                name,
            )
        faults.point("link.done")
        node.add_name(parent, name)
        parent.set_entry(name, node)
        self._after_making(parent, name)
        return self.stat(node)

    def _publish_link(
        self, link: Callable[[bytes, int], None], sheet: DirectorySheet, name: bytes
    ) -> None:
        upper = self._writable()
        try:
            link(name, sheet.fd())
        except FileExistsError:
            with upper.staged() as staged:
                link(staged, upper.work_fd)
                os.rename(staged, name, src_dir_fd=upper.work_fd, dst_dir_fd=sheet.fd())

    # --- removing entries ----------------------------------------------------------------------------------------

    def _shows_beneath(self, parent: DirNode, name: bytes) -> bool:
        """Whether lower layers would show something under `name` if the upper had nothing there."""
        if not parent.sheets:
            return False
        verdict = Verdict()
        for place, sheet in enumerate(parent.sheets):
            verdict.add(place, sheet.examine(name, beneath=True).fact)
            if verdict.closed or verdict.visible is not None:
                break
        return verdict.visible is not None

    async def unlink(self, parent: DirNode, name: bytes) -> None:
        """Remove a name that is no directory.

        Raises:
            OSError: ENOENT, EISDIR, EROFS, ENOSPC (a whiteout takes space) ...
        """
        self._writable()
        while True:
            node = self._present(parent, name)
            if node.is_directory:
                raise UnionError(errno.EISDIR)
            sheet = self.ensure_upper(parent)
            await self._count_names(node)
            if self._present(parent, name) is node:
                break
        self._remove_file(node, parent, sheet, name)
        faults.point("unlink.done")

    async def _count_names(self, node: Node) -> None:
        """Copy up the metadata of a hard-linked lower file: its link count is about to change."""
        if node.upper or node.is_directory or not self._writable().dialect.xattrs:
            return
        if self._stat_by_name(node).st_nlink > 1:
            await self.copy_up(node, data=False)

    def _present(self, parent: DirNode, name: bytes) -> Node:
        hit = self.lookup(parent, name)
        if hit is None:
            raise UnionError(errno.ENOENT)
        return hit[0]

    def _remove_file(self, node: Node, parent: DirNode, sheet: DirectorySheet, name: bytes) -> None:
        upper = self._writable()
        self._keep_reachable(node, parent, name)
        stands_in_upper = node.upper and (not node.indexed or sheet.has_entry(name))
        beneath = self._shows_beneath(parent, name)
        if not stands_in_upper:
            upper.put_whiteout(sheet, name)
        elif beneath:
            upper.replace_by_whiteout(sheet, name)
        else:
            os.unlink(name, dir_fd=sheet.fd())
        parent.drop_entry(name)
        self._lost_name(node, parent, name, stood_in_upper=stands_in_upper)

    def _keep_reachable(self, node: Node, parent: DirNode, name: bytes) -> None:
        """Hold on to an upper file that is about to lose the last name that is known of it.

        The kernel may still use it, and while it does its host number must not be given to another file.
        """
        if not node.upper or node.orphan_fd >= 0:
            return
        if not node.indexed and node.names() != [(parent, name)]:
            return
        with contextlib.suppress(
            OSError
        ):  # EMFILE: its number is guarded by the table, its data is not
            if node.file is not None and node.data is None:
                node.orphan_fd = os.dup(node.file.fd)
            else:
                _, dir_fd, at = self.location(node)
                node.orphan_fd = open_path(at, dir_fd)

    def _lost_name(self, node: Node, parent: DirNode, name: bytes, *, stood_in_upper: bool) -> None:
        upper = self._writable()
        node.drop_name(parent, name)
        if node.indexed:
            if not stood_in_upper:
                node.standing -= 1
                upper.write_standing(upper.index_name(node.number), node.standing)
            host_links = os.fstat(node.orphan_fd).st_nlink if node.orphan_fd >= 0 else 2
            if host_links - 1 + node.standing <= 0:
                upper.drop_index(upper.index_name(node.number))
                node.indexed = False
                node.dead = True
            elif node.orphan_fd >= 0:
                os.close(node.orphan_fd)
                node.orphan_fd = -1
        elif node.upper:
            if node.names():
                return
            node.dead = node.orphan_fd < 0 or os.fstat(node.orphan_fd).st_nlink == 0
        elif not node.names():
            node.dead = True

    def rmdir(self, parent: DirNode, name: bytes) -> None:
        """Remove an empty directory.

        Raises:
            OSError: ENOENT, ENOTDIR, ENOTEMPTY, EROFS ...
        """
        upper = self._writable()
        node = self._present(parent, name)
        if not isinstance(node, DirNode):
            raise UnionError(errno.ENOTDIR)
        self._check_empty(node)
        sheet = self.ensure_upper(parent)
        if node.upper_sheet is None:
            upper.put_whiteout(sheet, name)
        else:
            node.upper_sheet.pin()
            if self._shows_beneath(parent, name):
                upper.swap_directory_for_whiteout(sheet, name)
            else:
                upper.remove_directory(sheet, name)
        faults.point("rmdir.done")
        self._removed_directory(node, parent, name)

    def _removed_directory(self, node: DirNode, parent: DirNode, name: bytes) -> None:
        parent.drop_entry(name)
        parent.subdirectories -= 1
        node.drop_name(parent, name)
        node.dead = True

    def _check_empty(self, node: DirNode) -> None:
        self.load(node)
        if node.entries:
            raise UnionError(errno.ENOTEMPTY)

    # --- rename --------------------------------------------------------------------------------------------------

    async def rename(
        self,
        old_parent: DirNode,
        old_name: bytes,
        new_parent: DirNode,
        new_name: bytes,
        flags: int,
    ) -> None:
        """Rename (flags: RENAME_NOREPLACE, RENAME_EXCHANGE), also what lower layers hold.

        Raises:
            OSError: As rename(2); EXDEV for a lower directory where redirects are off or cannot be kept.
        """
        self._check_rename(new_parent, new_name, flags)
        exchange = bool(flags & syscalls.RENAME_EXCHANGE)
        while True:
            node = self._present(old_parent, old_name)
            target = self._rename_target(node, new_parent, new_name, flags)
            if node is target:
                return
            self._check_movable(node)
            await self._in_upper_at(node, old_parent, old_name)
            if target is not None and exchange:
                self._check_movable(target)
                await self._in_upper_at(target, new_parent, new_name)
            elif target is not None:
                await self._count_names(target)
            if self._still(old_parent, old_name, node) and self._still(
                new_parent, new_name, target
            ):
                break
        self.ensure_upper(new_parent)
        if exchange and target is not None:
            self._exchange(node, old_parent, old_name, target, new_parent, new_name)
        else:
            self._move(node, old_parent, old_name, target, new_parent, new_name)
        faults.point("rename.done")

    def _check_rename(self, new_parent: DirNode, new_name: bytes, flags: int) -> None:
        self._writable()
        if flags & ~_RENAME_FLAGS or flags == _RENAME_FLAGS:
            raise UnionError(errno.EINVAL)
        if len(new_name) > NAME_MAX:
            raise UnionError(errno.ENAMETOOLONG)
        if markers.is_marker_name(new_name):
            raise UnionError(errno.EINVAL)
        if new_parent.dead:
            raise UnionError(errno.ENOENT)

    def _rename_target(
        self, node: Node, new_parent: DirNode, new_name: bytes, flags: int
    ) -> Node | None:
        """What stands where the node is to go; refuses what POSIX refuses."""
        hit = self.lookup(new_parent, new_name)
        if hit is None:
            if flags & syscalls.RENAME_EXCHANGE:
                raise UnionError(errno.ENOENT)
            return None
        if flags & syscalls.RENAME_NOREPLACE:
            raise UnionError(errno.EEXIST)
        target = hit[0]
        if not flags & syscalls.RENAME_EXCHANGE and target is not node:
            if node.is_directory and not target.is_directory:
                raise UnionError(errno.ENOTDIR)
            if target.is_directory and not node.is_directory:
                raise UnionError(errno.EISDIR)
            if isinstance(target, DirNode):
                self._check_empty(target)
        return target

    def _check_movable(self, node: Node) -> None:
        redirects = self.options.redirect and self._writable().dialect.xattrs
        if isinstance(node, DirNode) and node.sheets and not redirects:
            raise UnionError(errno.EXDEV)

    def _still(self, parent: DirNode, name: bytes, node: Node | None) -> bool:
        hit = self.lookup(parent, name)
        return (hit[0] if hit is not None else None) is node

    def _before_moving_file(self, node: Node, parent: DirNode) -> None:
        """A copied-up file must be told from others, and a metacopy find its data, under any name."""
        upper = self._writable()
        path, _ = self.xattr_path(node)
        if node.data is not None:
            upper.set_redirect(path, node.data.below)
        sheet_upper = self.ensure_upper(parent)
        if not parent.impure and upper.read_origin(path) is not None:
            upper.make_impure(sheet_upper)
            parent.impure = True

    def _before_moving_directory(self, node: DirNode, parent: DirNode, name: bytes) -> None:
        """A directory must go on showing its own lower directories, and no others, in its new place."""
        upper = self._writable()
        assert node.upper_sheet is not None  # it was copied up
        if node.sheets:
            try:
                upper.set_redirect(node.upper_sheet.xattr_path(None), node.sheets[0].path())
            except OSError as error:
                raise UnionError(errno.EXDEV) from error
        elif self._shows_beneath(parent, name):
            upper.make_opaque(node.upper_sheet.xattr_path(None), node.upper_sheet.fd())
        node.upper_sheet.forget_marks()

    def _before_moving(self, node: Node, parent: DirNode, name: bytes) -> None:
        if isinstance(node, DirNode):
            self._before_moving_directory(node, parent, name)
        else:
            self._before_moving_file(node, parent)

    def _exchange(
        self,
        node: Node,
        old_parent: DirNode,
        old_name: bytes,
        target: Node,
        new_parent: DirNode,
        new_name: bytes,
    ) -> None:
        self._before_moving(node, new_parent, new_name)
        self._before_moving(target, old_parent, old_name)
        faults.point("rename.prepared")
        old_sheet, new_sheet = self.ensure_upper(old_parent), self.ensure_upper(new_parent)
        syscalls.renameat2(
            old_sheet.fd(), old_name, new_sheet.fd(), new_name, syscalls.RENAME_EXCHANGE
        )
        faults.point("rename.renamed")
        old_parent.drop_entry(old_name)
        new_parent.drop_entry(new_name)
        node.drop_name(old_parent, old_name)
        target.drop_name(new_parent, new_name)
        self._place(node, old_parent, new_parent, new_name)
        self._place(target, new_parent, old_parent, old_name)

    def _move(
        self,
        node: Node,
        old_parent: DirNode,
        old_name: bytes,
        target: Node | None,
        new_parent: DirNode,
        new_name: bytes,
    ) -> None:
        upper = self._writable()
        self._before_moving(node, new_parent, new_name)
        stood_in_upper = False
        if isinstance(target, DirNode):
            self._make_removable(target)
        elif target is not None:
            self._keep_reachable(target, new_parent, new_name)
            stood_in_upper = self.ensure_upper(new_parent).has_entry(new_name)
        leaves = self._shows_beneath(old_parent, old_name)
        faults.point("rename.prepared")
        old_sheet, new_sheet = self.ensure_upper(old_parent), self.ensure_upper(new_parent)
        if not upper.dialect.devices:
            if leaves:
                upper.put_aufs_whiteout(old_sheet, old_name)
            os.rename(old_name, new_name, src_dir_fd=old_sheet.fd(), dst_dir_fd=new_sheet.fd())
        elif node.is_directory and upper.has_whiteout(new_sheet, new_name):
            syscalls.renameat2(
                old_sheet.fd(), old_name, new_sheet.fd(), new_name, syscalls.RENAME_EXCHANGE
            )
            faults.point("rename.renamed")
            if not leaves:
                os.unlink(old_name, dir_fd=old_sheet.fd())
        else:
            self._rename_leaving(old_sheet, old_name, new_sheet, new_name, leaves=leaves)
        faults.point("rename.renamed")
        old_parent.drop_entry(old_name)
        node.drop_name(old_parent, old_name)
        if isinstance(target, DirNode):
            self._removed_directory(target, new_parent, new_name)
        elif target is not None:
            new_parent.drop_entry(new_name)
            self._lost_name(target, new_parent, new_name, stood_in_upper=stood_in_upper)
        self._place(node, old_parent, new_parent, new_name)
        self._after_making(new_parent, new_name)

    def _rename_leaving(
        self,
        old_sheet: DirectorySheet,
        old_name: bytes,
        new_sheet: DirectorySheet,
        new_name: bytes,
        *,
        leaves: bool,
    ) -> None:
        """Rename in the upper layer; `leaves`: a whiteout takes the old place in the same step."""
        if leaves:
            flags = syscalls.RENAME_WHITEOUT
            try:
                syscalls.renameat2(old_sheet.fd(), old_name, new_sheet.fd(), new_name, flags)
            except OSError as error:
                if error.errno not in {errno.EINVAL, errno.EPERM}:
                    raise
            else:
                return
            self._rename_by_exchange(old_sheet, old_name, new_sheet, new_name)
            return
        os.rename(old_name, new_name, src_dir_fd=old_sheet.fd(), dst_dir_fd=new_sheet.fd())

    def _rename_by_exchange(
        self,
        old_sheet: DirectorySheet,
        old_name: bytes,
        new_sheet: DirectorySheet,
        new_name: bytes,
    ) -> None:
        """For file systems without RENAME_WHITEOUT: put a whiteout in the new place, then swap the two."""
        upper = self._writable()
        if new_sheet.has_entry(new_name):
            # The object that is replaced must not vanish before the other one is there: hide it only by the swap.
            syscalls.renameat2(
                old_sheet.fd(), old_name, new_sheet.fd(), new_name, syscalls.RENAME_EXCHANGE
            )
            if stat.S_ISDIR(old_sheet.lstat(old_name).st_mode):
                upper.swap_directory_for_whiteout(old_sheet, old_name)
            else:
                upper.replace_by_whiteout(old_sheet, old_name)
            return
        upper.put_whiteout(new_sheet, new_name)
        syscalls.renameat2(
            old_sheet.fd(), old_name, new_sheet.fd(), new_name, syscalls.RENAME_EXCHANGE
        )

    def _make_removable(self, target: DirNode) -> None:
        """Free an empty directory that is to be replaced from the whiteouts in its upper directory.

        It is exchanged for a fresh opaque one, so that at every moment an empty directory is seen.
        """
        upper, parent = self._writable(), target.parent
        if target.upper_sheet is None or parent is None:
            return
        if not os.listdir(b"/proc/self/fd/%d" % target.upper_sheet.fd()):
            target.upper_sheet.pin()
            return
        st = target.upper_sheet.stat_self()
        source = target.upper_sheet.xattr_path(None)
        sheet = self.ensure_upper(parent)
        with upper.staged() as staged:
            copyup.make_special(st, None, upper.work_fd, staged)
            self._finish_staged(st, source, staged)
            fd = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper.work_fd)
            upper.make_opaque(upper.staged_path(staged), fd)
            with self._times_kept(parent):
                syscalls.renameat2(
                    upper.work_fd, staged, sheet.fd(), target.name, syscalls.RENAME_EXCHANGE
                )
            target.upper_sheet.close()
            target.upper_sheet.adopt_fd(fd)
        upper.discard(staged)

    def _place(self, node: Node, old_parent: DirNode, new_parent: DirNode, new_name: bytes) -> None:
        """Enter a moved node in its new directory."""
        if isinstance(node, DirNode):
            node.parent, node.name = new_parent, new_name
            old_parent.subdirectories -= 1
            new_parent.subdirectories += 1
            if node.upper_sheet is not None:
                node.upper_sheet.parent = new_parent.upper_sheet
                node.upper_sheet.name = new_name
        else:
            node.add_name(new_parent, new_name)
        new_parent.set_entry(new_name, node)

    # --- metadata ------------------------------------------------------------------------------------------------

    async def setattr(self, node: Node, changes: Changes) -> os.stat_result:
        """Change owner, mode, size and times.

        Raises:
            OSError: EROFS, EPERM (an id that the file system cannot hold), EFBIG, ENOSPC ...
        """
        resize = changes.size_bytes is not None
        await self.copy_up(node, data=resize, size_bytes=changes.size_bytes)
        path, follow = self.xattr_path(node)
        if changes.size_bytes is not None:
            self._truncate(node, path, changes.size_bytes, follow=follow)
        if changes.uid is not None or changes.gid is not None:
            uid = -1 if changes.uid is None else changes.uid
            gid = -1 if changes.gid is None else changes.gid
            os.chown(path, uid, gid, follow_symlinks=follow)
        if changes.mode is not None and node.kind != stat.S_IFLNK:
            _chmod(path, stat.S_IMODE(changes.mode), follow=follow)
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            st = self.stat(node)
            atime = st.st_atime_ns if changes.atime_ns is None else changes.atime_ns
            mtime = st.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns
            os.utime(path, ns=(atime, mtime), follow_symlinks=follow)
        faults.point("setattr.done")
        return self.stat(node)

    @staticmethod
    def _truncate(node: Node, path: bytes, size_bytes: int, *, follow: bool) -> None:
        if node.kind != stat.S_IFREG:
            raise UnionError(errno.EINVAL)
        if node.file is not None and node.file.writable:
            os.ftruncate(node.file.fd, size_bytes)
        else:
            fd = _open_upper(path, os.O_WRONLY, follow=follow)
            try:
                os.ftruncate(fd, size_bytes)
            finally:
                os.close(fd)

    async def setxattr(self, node: Node, name: bytes, value: bytes) -> None:
        """Set an attribute; what would read as a marker is kept under an escaped name."""
        await self.copy_up(node, data=False)
        path, follow = self.xattr_path(node)
        os.setxattr(path, markers.to_disk_xattr(name), value, follow_symlinks=follow)
        faults.point("setxattr.done")

    async def removexattr(self, node: Node, name: bytes) -> None:
        """Remove an attribute.

        Raises:
            OSError: ENODATA when it has none of that name (nothing is copied up then).
        """
        self._writable()
        self.getxattr(node, name)
        await self.copy_up(node, data=False)
        path, follow = self.xattr_path(node)
        os.removexattr(path, markers.to_disk_xattr(name), follow_symlinks=follow)

    # --- files ---------------------------------------------------------------------------------------------------

    async def open(self, node: Node, flags: int, *, drops: int = 0) -> OpenFile:
        """Open a regular file; all its handles share one descriptor.

        Args:
            drops: Mode bits that truncating takes from the file (and with any its capabilities), as it does for a
                caller without CAP_FSETID.

        Raises:
            OSError: EROFS for writing to a read-only stack; ENOSPC, EIO (copy-up) ...
        """
        writes = (flags & os.O_ACCMODE) != os.O_RDONLY
        truncates = bool(flags & os.O_TRUNC)
        if writes or truncates:
            await self.copy_up(node, data=True, size_bytes=0 if truncates else None)
        file = node.file
        if file is None:
            file = node.file = self._open_file(node, writes=writes or truncates)
        elif (writes or truncates) and not file.writable:
            self._widen(node, file)
        if truncates:
            os.ftruncate(file.fd, 0)
            if drops:
                self._drop_privileges(file, drops)
        file.users += 1
        return file

    def _open_file(self, node: Node, *, writes: bool) -> OpenFile:
        if not node.upper or node.data is not None:
            return OpenFile(self._open_lower_data(node), writable=False)
        path, follow = self.xattr_path(node)
        flags = os.O_RDWR if writes else os.O_RDONLY
        return OpenFile(_open_upper(path, flags, follow=follow), writable=writes)

    def _widen(self, node: Node, file: OpenFile) -> None:
        """Let the shared descriptor write, too; its number stays."""
        path, follow = self.xattr_path(node)
        fd = _open_upper(path, os.O_RDWR, follow=follow)
        os.dup2(fd, file.fd, inheritable=False)
        os.close(fd)
        file.writable = True

    @staticmethod
    def _drop_privileges(file: OpenFile, drops: int) -> None:
        """What a change by an ordinary user takes from a file: set-user-id, set-group-id, capabilities."""
        mode = stat.S_IMODE(os.fstat(file.fd).st_mode)
        if mode & drops:
            os.fchmod(file.fd, mode & ~drops)
        with contextlib.suppress(OSError):
            os.removexattr(file.fd, _CAPABILITY)

    def release(self, node: Node) -> None:
        """One handle of the file was closed."""
        file = node.file
        if file is None:
            return
        file.users -= 1
        if file.users <= 0:
            node.file = None
            os.close(file.fd)
            if node.lookups <= 0 and node is not self.root:
                self._release_node(node)

    async def sync_file(self, node: Node, *, data_only: bool) -> None:
        """Make the contents of an open file durable."""
        file = node.file
        if file is None or not node.upper:
            return
        fd = os.dup(file.fd)
        try:
            await self._in_thread(lambda: (os.fdatasync if data_only else os.fsync)(fd))
        finally:
            os.close(fd)

    async def sync_directory(self, node: DirNode) -> None:
        """Make the entries of a directory durable."""
        if node.upper_sheet is None:
            return
        fd = os.dup(node.upper_sheet.fd())
        try:
            await self._in_thread(lambda: os.fsync(fd))
        finally:
            os.close(fd)


def open_path(name: bytes, dir_fd: int) -> int:
    """A descriptor that keeps an object reachable, whatever it is."""
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def _open_upper(path: bytes, flags: int, *, follow: bool) -> int:
    """Open an upper file for its data; what somebody put in its place is not followed and not waited for."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))


def _chmod(path: bytes, mode: int, *, follow: bool) -> None:
    """chmod(2) that does not follow a symbolic link somebody put in the place of an upper file."""
    if follow:
        os.chmod(path, mode)
        return
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.chmod(b"/proc/self/fd/%d" % fd, mode)
    finally:
        os.close(fd)


def open_quietly(opener: Callable[[bytes, int], int], name: bytes, flags: int) -> int:
    """Open a lower file without leaving a trace in its access time, where that is allowed (open(2))."""
    try:
        return opener(name, flags | os.O_NOATIME)
    except PermissionError:
        return opener(name, flags)
