"""What a stack of layers shows: look-up, listing, metadata, reading.

Holds the nodes that the kernel knows and asks the union rule (`resolve`) about everything else.  Changes nothing
on disk; `tree` adds the verbs that do.  All of it is synchronous work on descriptors; a descriptor from a sheet is
used within one step and never kept across an await.

Source: Linux Documentation/filesystems/overlayfs.rst for what a union shows.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unionfs import markers
from unionfs.errors import CorruptLayerError, ReadOnlyStackError, StaleNodeError, UnionError
from unionfs.inodes import ROOT_INO, Data, DirNode, Node, NodeTable, derive
from unionfs.layer import DirectorySheet, walk
from unionfs.resolve import Kind, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from unionfs.layer import Hit, Layer, Sheet
    from unionfs.upper import Upper

NAME_MAX = 255
_UNKNOWN_PLACE = -2
_S_IFMT = 0o170000  # linux/stat.h
_MISSES_BEFORE_LISTING = 8


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """What the mount's options mean for the tree.

    Attributes:
        metacopy: Copy up metadata alone where data does not change.
        redirect: Rename directories of lower layers in place; without, EXDEV.
        fsync: Make copied-up data durable before it is published.
        caching: The layers change only through this mount, so what was listed once stays true.
        static_nlink: Report 1 as every directory's link count.
        ino32: Show inode numbers of 32 bits.
        read_only: Refuse changes although there is an upper layer.
    """

    metacopy: bool = True
    redirect: bool = True
    fsync: bool = True
    caching: bool = True
    static_nlink: bool = False
    ino32: bool = False
    read_only: bool = False


@dataclass(slots=True)
class Found:
    """What the union rule made of one name.

    Attributes:
        st: Metadata of the visible object.
        place: The sheet of the parent that shows it: -1 the upper's.
        upper_sheet: For a directory, its upper sheet.
        sheets: For a directory, its lower sheets.
        sheet, name: For anything else in a lower layer, where it is.
        data: For metadata that stands above its data (metacopy), where the data is.
        below: For a metacopy, the path by which the next layer down with a part in it is found.
    """

    st: os.stat_result
    place: int
    upper_sheet: DirectorySheet | None = None
    sheets: list[Sheet] = field(default_factory=list)
    sheet: Sheet | None = None
    name: bytes = b""
    data: tuple[Sheet, bytes] | None = None
    below: bytes = b""


class UnionView:
    """A union of layers, as its users see it."""

    def __init__(self, lowers: list[Layer], upper: Upper | None, options: TreeOptions) -> None:
        """Stack `lowers`, topmost first, under `upper`; the tree takes them over."""
        self.lowers = lowers
        self.upper = upper
        self.options = options
        self.table = NodeTable(narrow=options.ino32)
        self.root = DirNode(ROOT_INO, None, b"")
        self.root.lookups = 1
        self._stack_root()

    def _stack_root(self) -> None:
        root = self.root
        closed = False
        if self.upper is not None:
            root.upper_sheet = self.upper.root
            root.impure = root.upper_sheet.marks().impure
            closed = root.upper_sheet.marks().opaque
        for layer in self.lowers:
            if closed or layer.data_only:
                break
            root.sheets.append(layer.root)
            hit_opaque = isinstance(layer.root, DirectorySheet) and (
                layer.root.marks().opaque or layer.root.has_entry(markers.AUFS_OPAQUE)
            )
            closed = hit_opaque
        top: Layer = root.sheets[0].layer if root.sheets else self._upper().layer
        root.host_ino = top.root.stat_self().st_ino
        self.root_number = self.table.shown(derive(top, root.host_ino))
        self.table.add(root, top, upper=not root.sheets)

    def close(self) -> None:
        """Close all files and layers."""
        for node in self.table.nodes.values():
            if node.file is not None:
                os.close(node.file.fd)
                node.file = None
            if node.orphan_fd >= 0:
                os.close(node.orphan_fd)
                node.orphan_fd = -1
        for layer in self.lowers:
            layer.close()
        if self.upper is not None:
            self.upper.close()

    # --- nodes ---------------------------------------------------------------------------------------------------

    def node(self, ino: int) -> Node:
        """The node that the kernel names.

        Raises:
            StaleNodeError: It is not known.
        """
        try:
            return self.table.nodes[ino]
        except KeyError:
            raise StaleNodeError(ino) from None

    def directory(self, ino: int) -> DirNode:
        """The directory that the kernel names."""
        node = self.node(ino)
        if not isinstance(node, DirNode):
            raise UnionError(errno.ENOTDIR)
        return node

    def forget(self, ino: int, count: int) -> None:
        """The kernel drops `count` of its references."""
        node = self.table.nodes.get(ino)
        if node is None or node is self.root:
            return
        node.lookups -= count
        if node.lookups <= 0:
            self._release_node(node)

    def _release_node(self, node: Node) -> None:
        if node.file is not None or node.copying is not None:
            return
        if isinstance(node, DirNode) and node.known and not node.dead:
            return
        if self.table.nodes.get(node.ino) is not node:
            return
        self.table.remove(node)
        above = []
        for parent, name in node.names():
            parent.unknow_entry(name, self._place_of(parent, node))
            above.append(parent)
        if isinstance(node, DirNode) and node.upper_sheet is not None:
            node.upper_sheet.close()  # it may be pinned, and a new node gets a sheet of its own
        for parent in above:
            if parent.lookups <= 0 and parent is not self.root and not parent.known:
                self._release_node(parent)

    @staticmethod
    def _place_of(parent: DirNode, node: Node) -> int:
        if not isinstance(node, DirNode) and not node.indexed:
            if node.upper:
                return -1
            for place, sheet in enumerate(parent.sheets):
                if sheet is node.sheet:
                    return place
        return _UNKNOWN_PLACE

    # --- look-up -------------------------------------------------------------------------------------------------

    def lookup(self, parent: DirNode, name: bytes) -> tuple[Node, os.stat_result] | None:
        """What `name` shows in `parent`; None when there is nothing.

        Raises:
            OSError: ENAMETOOLONG, or what a layer answered (EIO ...).
        """
        entry = parent.entries.get(name)
        if self.options.caching:
            if isinstance(entry, Node):
                return entry, self.stat(entry)
            if entry is None and not self._may_have(parent, name):
                return None
            entry = parent.entries.get(name)
        elif len(name) > NAME_MAX:
            raise UnionError(errno.ENAMETOOLONG)
        if markers.is_marker_name(name) or parent.dead:
            return None
        return self._look_on_disk(parent, name, entry)

    def _may_have(self, parent: DirNode, name: bytes) -> bool:
        """Whether it is worth asking the layers about a name of which nothing is known."""
        if len(name) > NAME_MAX:
            raise UnionError(errno.ENAMETOOLONG)
        if parent.complete:
            return name in parent.entries
        parent.misses += 1
        if parent.misses > _MISSES_BEFORE_LISTING and parent.sheets:
            # After some of these it pays to list the whole directory.
            self.load(parent)
            return name in parent.entries
        return True

    def _look_on_disk(
        self, parent: DirNode, name: bytes, entry: Node | int | None
    ) -> tuple[Node, os.stat_result] | None:
        if (
            self.options.caching
            and isinstance(entry, int)
            and entry >= -1
            and not parent.sheet_at(entry).impure
        ):
            quick = self._adopt_plain(parent, name, entry)
            if quick is not None:
                return quick
        found = self.resolve(parent, name)
        if found is None:
            if isinstance(entry, Node):
                entry.drop_name(parent, name)
            parent.drop_entry(name)
            return None
        return self._adopt(parent, name, found)

    def _adopt_plain(
        self, parent: DirNode, name: bytes, place: int
    ) -> tuple[Node, os.stat_result] | None:
        """The short way for what a listing placed: no directory, no hard links, no holes, nothing to merge."""
        sheet = parent.sheet_at(place)
        return self.adopt_plain(parent, name, place, sheet, sheet.lstat(name))

    def adopt_plain(
        self, parent: DirNode, name: bytes, place: int, sheet: Sheet, st: os.stat_result
    ) -> tuple[Node, os.stat_result] | None:
        """Enter a plain file whose metadata is at hand; None when the union rule has to be asked."""
        kind = st.st_mode & _S_IFMT
        if kind == stat.S_IFDIR or st.st_nlink != 1 or st.st_blocks * 512 < st.st_size:
            return None
        layer = sheet.layer
        ino = st.st_ino if layer.salt == 0 else derive(layer, st.st_ino)
        node = Node(ino, kind, parent, name, None if place < 0 else sheet)
        nodes = self.table.nodes
        if ino in nodes or layer.salt != 0 or self.table.narrow:
            known = self.table.find(ino, layer, st.st_ino, upper=place < 0)
            if known is not None:
                known.add_name(parent, name)
                node = known
            else:
                node.host_ino = st.st_ino
                self.table.add(node, layer, upper=place < 0)
        else:
            nodes[ino] = node
        parent.set_entry(name, node)
        return node, st

    def resolve(self, parent: DirNode, name: bytes) -> Found | None:
        """Ask the union rule about `name`, layer by layer, following redirects.

        Raises:
            CorruptLayerError: A metacopy without data.
        """
        verdict = Verdict()
        found: Found | None = None
        for place, sheet, name_there, hit in self._facts(parent, name, verdict):
            if not verdict.add(place, hit.fact) or hit.st is None:
                continue
            if found is None:
                found = Found(hit.st, place)
                if place != -1:
                    found.sheet, found.name = sheet, name_there
            if isinstance(hit.sheet, DirectorySheet) and place == -1:
                found.upper_sheet = hit.sheet
            elif hit.sheet is not None:
                found.sheets.append(hit.sheet)
            if verdict.kind is Kind.METACOPY and hit.st is not found.st:
                found.below = found.below or join(sheet.path(), name_there)
                if hit.fact.kind is Kind.FILE and stat.S_ISREG(hit.st.st_mode):
                    found.data = sheet, name_there
        if found is not None and verdict.kind is Kind.METACOPY and found.data is None:
            what = f"{os.fsdecode(name)}: metadata without data in any layer"
            raise CorruptLayerError(what)
        return found

    def _facts(
        self, parent: DirNode, name: bytes, verdict: Verdict
    ) -> Iterator[tuple[int, Sheet, bytes, Hit]]:
        """The facts of each layer about `name`, topmost first, as long as the verdict stays open."""
        redirect: list[bytes] | None = None
        below = 0
        if parent.upper_sheet is not None:
            hit = parent.upper_sheet.examine(name, beneath=bool(parent.sheets))
            yield -1, parent.upper_sheet, name, hit
            if hit.redirect is not None:
                absolute, parts = hit.redirect
                redirect = parts if absolute else None
                name = name if absolute else parts[0]
        last = len(parent.sheets) - 1
        for place, sheet in enumerate(parent.sheets if redirect is None else ()):
            if verdict.closed:
                return
            hit = sheet.examine(name, beneath=place < last)
            yield place, sheet, name, hit
            if hit.redirect is not None and not verdict.closed:
                absolute, parts = hit.redirect
                if absolute:
                    redirect, below = parts, sheet.layer.index + 1
                    break
                name = parts[0]
        if redirect is not None:
            yield from self._facts_along(redirect, below, verdict)

    def _facts_along(
        self, components: list[bytes], first: int, verdict: Verdict
    ) -> Iterator[tuple[int, Sheet, bytes, Hit]]:
        """The facts of the layers from `first` down about the path that an absolute redirect names."""
        for layer in self.lowers[first:]:
            if verdict.closed:
                return
            if layer.data_only and verdict.kind is not Kind.METACOPY:
                return
            way = walk(layer, components)
            name = components[-1]
            components = way.components
            if way.sheet is not None:
                hit = way.sheet.examine(name, beneath=True)
                yield layer.index, way.sheet, name, hit
                if hit.redirect is not None:
                    absolute, parts = hit.redirect
                    components = parts if absolute else [*components[:-1], *parts]
            if way.closed:
                return

    def _adopt(self, parent: DirNode, name: bytes, found: Found) -> tuple[Node, os.stat_result]:
        """The node for what was found, made or met again, entered in its parent."""
        old = parent.entries.get(name)
        if stat.S_ISDIR(found.st.st_mode):
            node: Node = self._adopt_directory(parent, name, found)
            st = found.st
        else:
            node, st = self._adopt_file(parent, name, found)
            node.add_name(parent, name)
        if isinstance(old, Node) and old is not node:
            old.drop_name(parent, name)
        parent.set_entry(name, node)
        return node, st

    def _adopt_directory(self, parent: DirNode, name: bytes, found: Found) -> DirNode:
        if found.sheets:
            layer = found.sheets[0].layer
            lower_st = found.st if found.place >= 0 else found.sheets[0].stat_self()
            host_ino = lower_st.st_ino
        else:
            layer, host_ino = self._upper().layer, found.st.st_ino
        number = derive(layer, host_ino)
        node = self.table.find(number, layer, host_ino, upper=not found.sheets)
        if isinstance(node, DirNode) and node.parent is parent and node.name == name:
            return node
        made = DirNode(number, parent, name)
        made.host_ino = host_ino
        made.upper_sheet = found.upper_sheet
        made.sheets = found.sheets
        if found.upper_sheet is not None:
            made.impure = found.upper_sheet.marks().impure
        self.table.add(made, layer, upper=not found.sheets)
        return made

    def _adopt_file(
        self, parent: DirNode, name: bytes, found: Found
    ) -> tuple[Node, os.stat_result]:
        st = found.st
        upper = self.upper
        in_upper = found.place == -1
        indexed = False
        if upper is not None and in_upper:
            layer: Layer = upper.layer
            number = derive(layer, st.st_ino)
            if parent.impure or st.st_nlink > 1:
                number, indexed = self._origin_of(parent, name, st, number)
        else:
            assert found.sheet is not None  # what is not upper is in a lower layer
            layer = found.sheet.layer
            number = derive(layer, st.st_ino)
            if upper is not None and st.st_nlink > 1:
                index_name = upper.index_name(number)
                if index_name in upper.indexed:
                    st = os.stat(index_name, dir_fd=upper.links_fd, follow_symlinks=False)
                    in_upper = indexed = True
                    self._index_data(found, index_name)
                    layer = upper.layer
        node = self.table.find(number, layer, st.st_ino, upper=in_upper)
        if node is not None and not node.is_directory:
            if not self.options.caching:
                self._rebind(node, parent, name, found, in_upper=in_upper)
            return node, st
        node = Node(number, stat.S_IFMT(st.st_mode), parent, name, None)
        node.indexed, node.host_ino = indexed, st.st_ino
        if found.data is not None:
            node.data = Data(*found.data, found.below)
        if not in_upper:
            node.sheet, node.lower_name = found.sheet, found.name
        if indexed and upper is not None:
            node.standing = upper.read_standing(upper.index_name(number))
        self.table.add(node, layer, upper=in_upper)
        return node, st

    @staticmethod
    def _rebind(node: Node, parent: DirNode, name: bytes, found: Found, *, in_upper: bool) -> None:
        """Where layers change under the mount, a new file may have got the host number of one that went."""
        node.kind = stat.S_IFMT(found.st.st_mode)
        if in_upper:
            others = {known for known in node.names() if known != (parent, name)}
            node.parent, node.name, node.others = parent, name, others or None
        else:
            node.sheet, node.lower_name = found.sheet, found.name

    def _origin_of(
        self, parent: DirNode, name: bytes, st: os.stat_result, number: int
    ) -> tuple[int, bool]:
        """The number that an upper file shows, and whether it is one of the index's."""
        upper, sheet = self._upper(), parent.upper_sheet
        origin = upper.read_origin(sheet.xattr_path(name)) if sheet is not None else None
        if origin is None:
            return number, False
        index_name = upper.index_name(origin)
        if index_name not in upper.indexed:
            return origin, False
        index_st = os.stat(index_name, dir_fd=upper.links_fd, follow_symlinks=False)
        return origin, index_st.st_ino == st.st_ino

    def _index_data(self, found: Found, index_name: bytes) -> None:
        """Where the data of an indexed file is, that was found through one of its lower names."""
        upper = self._upper()
        path = b"/proc/self/fd/%d/%b" % (upper.links_fd, index_name)
        if markers.get_xattr(path, upper.dialect.name("metacopy")) is None:
            found.data = None
        elif found.sheet is not None:
            found.below = join(found.sheet.path(), found.name)
            found.data = found.data or (found.sheet, found.name)

    # --- listing -------------------------------------------------------------------------------------------------

    def load(self, parent: DirNode) -> None:
        """List a directory through all its sheets, so that `entries` is complete.

        Raises:
            OSError: A layer could not be read.
        """
        if parent.complete and self.options.caching:
            return
        places: dict[bytes, Node | int] = {}
        subdirectories = 0
        hidden: set[bytes] = set()
        first = -1 if parent.upper_sheet is not None else 0
        for place in range(first, len(parent.sheets)):
            names, directories, hides = parent.sheet_at(place).scan()
            if not places and not hidden:
                places = dict.fromkeys(names, place)
                subdirectories = len(directories)
            else:
                fresh = [name for name in names if name not in places and name not in hidden]
                places.update(dict.fromkeys(fresh, place))
                subdirectories += len(directories.intersection(fresh))
            hidden |= hides
        known = [
            (name, entry)
            for name, entry in parent.entries.items()
            if isinstance(entry, Node) and name in places
        ]
        places.update(known)
        parent.entries = places
        parent.known = len(known)
        parent.subdirectories = subdirectories
        parent.complete = True

    def names(self, parent: DirNode) -> list[bytes]:
        """All names in a directory, a snapshot that later changes do not touch."""
        if parent.dead:
            return []
        self.load(parent)
        return list(parent.entries)

    def entry(self, parent: DirNode, name: bytes) -> tuple[Node, os.stat_result] | None:
        """One entry of a listing: its node and metadata; None when it is gone since."""
        try:
            return self.lookup(parent, name)
        except FileNotFoundError:
            return None

    # --- metadata ------------------------------------------------------------------------------------------------

    def location(self, node: Node) -> tuple[DirectorySheet | None, int, bytes]:
        """Where the metadata of a node that is no orphan stands: (sheet, directory descriptor, name).

        The sheet is None for the index and for layers that are no directories on disk.

        Raises:
            StaleNodeError: It has no name left.
        """
        if node.upper:
            if node.indexed:
                upper = self._upper()
                return None, upper.links_fd, upper.index_name(node.number)
            if node.parent is None or node.parent.upper_sheet is None:
                raise StaleNodeError(node.ino)
            sheet = node.parent.upper_sheet
            return sheet, sheet.fd(), node.name
        lower = node.sheet
        if not isinstance(lower, DirectorySheet):
            raise StaleNodeError(node.ino)
        return lower, lower.fd(), node.lower_name

    def stat(self, node: Node) -> os.stat_result:
        """Metadata of a node as its layer has it; `link_count` and `blocks` correct two fields of it.

        Raises:
            OSError: The object is gone from its layer, or cannot be read.
        """
        if isinstance(node, DirNode):
            sheet: Sheet = node.upper_sheet if node.upper_sheet is not None else node.sheets[0]
            return sheet.stat_self()
        if node.state is None and node.sheet is not None:
            return node.sheet.lstat(node.name)
        if node.file is not None:
            return os.fstat(node.file.fd) if node.data is None else self._stat_by_name(node)
        return self._stat_by_name(node)

    def _stat_by_name(self, node: Node) -> os.stat_result:
        if node.orphan_fd >= 0:
            return os.fstat(node.orphan_fd)
        if node.upper:
            _, dir_fd, name = self.location(node)
            return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if node.sheet is None:
            raise StaleNodeError(node.ino)
        return node.sheet.lstat(node.lower_name)

    def link_count(self, node: Node, st: os.stat_result) -> int:
        """How many names the union has for a node whose layer answered `st`."""
        if node.dead:
            return 0
        if isinstance(node, DirNode):
            if self.options.static_nlink:
                return 1
            if len(node.sheets) + (node.upper_sheet is not None) == 1:
                return st.st_nlink
            self.load(node)
            return 2 + node.subdirectories
        if node.indexed:
            return max(1, st.st_nlink - 1 + node.standing)
        return st.st_nlink

    def blocks(self, node: Node, st: os.stat_result) -> int:
        """Blocks of 512 bytes that the contents take: a metacopy's are the lower file's."""
        if node.data is not None:
            return node.data.sheet.lstat(node.data.name).st_blocks
        return st.st_blocks

    def shown_ino(self, node: Node) -> int:
        """The inode number that users see (the root's node id is fixed by the kernel)."""
        return self.root_number if node is self.root else node.ino

    # --- reading -------------------------------------------------------------------------------------------------

    def readlink(self, node: Node) -> bytes:
        """Target of a symbolic link."""
        if node.orphan_fd >= 0:
            return os.readlink(b"", dir_fd=node.orphan_fd)
        if not node.upper and node.sheet is not None:
            return node.sheet.readlink(node.lower_name)
        _, dir_fd, name = self.location(node)
        return os.readlink(name, dir_fd=dir_fd)

    def xattr_path(self, node: Node) -> tuple[bytes, bool]:
        """A path for the *xattr calls, and whether its last part is to be followed."""
        if isinstance(node, DirNode):
            sheet: Sheet = node.upper_sheet if node.upper_sheet is not None else node.sheets[0]
            return sheet.xattr_path(None), False
        if node.orphan_fd >= 0:
            return b"/proc/self/fd/%d" % node.orphan_fd, True
        if node.upper:
            _, dir_fd, name = self.location(node)
            return b"/proc/self/fd/%d/%b" % (dir_fd, name), False
        if node.sheet is None:
            raise StaleNodeError(node.ino)
        return node.sheet.xattr_path(node.lower_name), False

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Value of an attribute.

        Raises:
            OSError: ENODATA when it has none of that name.
        """
        path, follow = self.xattr_path(node)
        return os.getxattr(path, markers.to_disk_xattr(name), follow_symlinks=follow)

    def listxattr(self, node: Node) -> list[bytes]:
        """Names of the attributes that users may see."""
        path, follow = self.xattr_path(node)
        try:
            names = os.listxattr(path, follow_symlinks=follow)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return []
            raise
        shown = (markers.from_disk_xattr(os.fsencode(name)) for name in names)
        return [name for name in shown if name is not None]

    def statfs(self) -> os.statvfs_result:
        """Space and limits: the upper layer's, or the topmost lower's in a read-only stack."""
        if self.upper is not None:
            return os.fstatvfs(self.upper.work_fd)
        root = self.lowers[0].root
        return os.statvfs(root.xattr_path(None))

    # --- the upper layer -----------------------------------------------------------------------------------------

    def _upper(self) -> Upper:
        if self.upper is None:
            raise ReadOnlyStackError
        return self.upper


def join(directory: bytes, name: bytes) -> bytes:
    """A path inside a layer."""
    return directory + name if directory == b"/" else directory + b"/" + name
