"""Identity: what the kernel remembers of the union, one `Node` per inode.

Numbers are derived from the layers, not counted, so they survive copy-up and a remount.  Where two live files
would claim one number (hash collision, a host number reused while the kernel still remembers its old owner), the
later one gets a spare number for as long as it is remembered.

What a native front would need to know about an inode is plain data in `Node`.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import trio

    from unionfs.layer import DirectorySheet, Layer, Sheet

ROOT_INO = 1
_SPARE_FIRST = 1 << 61
_NARROW = 1 << 31
_HASHED = 1 << 62
_HASH_MASK = _HASHED - 1
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so the multiplication loses nothing


def derive(layer: Layer, host_ino: int) -> int:
    """The inode number that the union shows for a host number of `layer`."""
    if layer.salt == 0:
        return host_ino
    return ((host_ino * _GOLDEN + layer.salt) & _HASH_MASK) | _HASHED


def narrow(number: int) -> int:
    """What is shown for `number` where 32 bits are wanted: 31 bits, since the other half is for spare numbers."""
    if number < _NARROW:
        return number
    return (number * _GOLDEN >> 32) & (_NARROW - 1) or _NARROW - 1


@dataclass(slots=True, eq=False)
class OpenFile:
    """The one descriptor through which all handles of a file read and write; its number never changes."""

    fd: int
    writable: bool
    users: int = 0


@dataclass(frozen=True, slots=True)
class Data:
    """Where the data of a file is whose metadata stands above it (metacopy).

    Attributes:
        sheet, name: The data.
        below: The path, in the layers further down, of the next part of this file (overlayfs's redirect).
    """

    sheet: Sheet
    name: bytes
    below: bytes


T = TypeVar("T")


@dataclass(slots=True, eq=False)
class State:
    """What is true of few nodes only, so that the many do without it; see `Node`."""

    others: set[tuple[DirNode, bytes]] | None = None
    lower_name: bytes = b""
    data: Data | None = None
    indexed: bool = False
    standing: int = 0
    number: int = 0
    host_ino: int = 0
    file: OpenFile | None = None
    orphan_fd: int = -1
    dead: bool = False
    copying: trio.Event | None = None


class _Rare(Generic[T]):
    """An attribute of `Node` that lives in its `State`, which is made when a value is first set."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, node: Node, owner: type) -> T:
        if node.state is None:
            return self._default
        value: T = getattr(node.state, self._name)
        return value

    def __set__(self, node: Node, value: T) -> None:
        if node.state is None:
            if value == self._default:
                return
            node.state = State()
        setattr(node.state, self._name, value)


class Node:
    """An inode that the kernel knows, or is about to.

    There is one per file that the kernel has seen, so a plain one is kept small: what few have is in `state`.

    Attributes:
        ino: Number shown, and the kernel's node id.
        kind: The S_IFMT bits of its mode.
        lookups: How many references the kernel holds.
        parent, name: One name of it in the union; None when it has none that is known.
        sheet: The directory of the lower layer that has it; None when its metadata is in the upper layer.
        state: What is not as with most; None where all of it is.
        others: Further names that are known, or None.
        data: Where its data is, for metadata that stands above it; else None.
        indexed: Its upper file is reached through the index of hard-linked copy-ups.
        standing: For an indexed node, how many names still stand in lower layers.
        file: Open descriptor, while it is open.
        orphan_fd: Keeps an object without a known name reachable; -1 otherwise.
        dead: No name is left in the union.
        copying: Set while a copy-up of it is under way in a thread.
    """

    __slots__ = ("ino", "kind", "lookups", "name", "parent", "sheet", "state")

    def __init__(
        self, ino: int, kind: int, parent: DirNode | None, name: bytes, sheet: Sheet | None
    ) -> None:
        self.ino = ino
        self.kind = kind
        self.parent = parent
        self.name = name
        self.sheet = sheet
        self.lookups = 0
        self.state: State | None = None

    others: _Rare[set[tuple[DirNode, bytes]] | None] = _Rare(None)
    data: _Rare[Data | None] = _Rare(None)
    indexed: _Rare[bool] = _Rare(default=False)
    standing: _Rare[int] = _Rare(0)
    file: _Rare[OpenFile | None] = _Rare(None)
    orphan_fd: _Rare[int] = _Rare(-1)
    dead: _Rare[bool] = _Rare(default=False)
    copying: _Rare[trio.Event | None] = _Rare(None)

    @property
    def upper(self) -> bool:
        """Its metadata is in the upper layer."""
        return self.sheet is None

    @property
    def lower_name(self) -> bytes:
        """Its name in `sheet`."""
        if self.state is not None and self.state.lower_name:
            return self.state.lower_name
        return self.name

    @lower_name.setter
    def lower_name(self, name: bytes) -> None:
        if name != self.lower_name:
            self.state = self.state or State()
            self.state.lower_name = name

    @property
    def number(self) -> int:
        """The number that was derived for it, which is kept on disk; `ino` unless that was taken or too wide."""
        if self.state is not None and self.state.number:
            return self.state.number
        return self.ino

    @property
    def host_ino(self) -> int:
        """The host's inode number of its file in the layer that has its metadata."""
        if self.state is not None and self.state.host_ino:
            return self.state.host_ino
        return self.ino

    @host_ino.setter
    def host_ino(self, number: int) -> None:
        if number != self.host_ino:
            self.state = self.state or State()
            self.state.host_ino = number

    def show(self, ino: int) -> None:
        """Show another number than the derived one."""
        state = self.state or State()
        state.number, state.host_ino = self.number, self.host_ino
        self.state, self.ino = state, ino

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == stat.S_IFDIR

    def add_name(self, parent: DirNode, name: bytes) -> None:
        """Note a name of this node; the entry of `parent` is the caller's."""
        if self.parent is None:
            self.parent, self.name = parent, name
        elif (self.parent, self.name) != (parent, name):
            if self.others is None:
                self.others = set()
            self.others.add((parent, name))
        self.dead = False

    def drop_name(self, parent: DirNode, name: bytes) -> None:
        """Forget a name; another known one takes its place."""
        if self.parent is parent and self.name == name:
            if self.sheet is not None:
                self.state = self.state or State()
                self.state.lower_name = self.lower_name  # the name in its layer does not change
            if self.others:
                self.parent, self.name = self.others.pop()
            else:
                self.parent, self.name = None, b""
        elif self.others is not None:
            self.others.discard((parent, name))

    def names(self) -> list[tuple[DirNode, bytes]]:
        """All names that are known."""
        if self.parent is None:
            return []
        return [(self.parent, self.name), *(self.others or ())]


class DirNode(Node):
    """A directory of the union.

    Attributes:
        upper_sheet: Its directory in the upper layer, if it has one.
        sheets: Its directories in lower layers, topmost first; what is listed here is merged.
        entries: What is known to be in it: a Node that the kernel knows, or the place of the sheet that shows the
            name (-1 the upper's).
        complete: `entries` holds every name.
        subdirectories: How many of them are directories, while complete.
        known: How many of `entries` are Nodes.
        misses: Look-ups answered from disk so far; many of them make listing the directory worth while.
        impure: Its upper directory may hold copied-up entries.
    """

    __slots__ = (
        "complete",
        "entries",
        "impure",
        "known",
        "misses",
        "sheets",
        "subdirectories",
        "upper_sheet",
    )

    def __init__(self, ino: int, parent: DirNode | None, name: bytes) -> None:
        super().__init__(ino, stat.S_IFDIR, parent, name, None)
        self.upper_sheet: DirectorySheet | None = None
        self.sheets: list[Sheet] = []
        self.entries: dict[bytes, Node | int] = {}
        self.complete = False
        self.subdirectories = 0
        self.known = 0
        self.misses = 0
        self.impure = False

    @property
    def upper(self) -> bool:
        """It has a directory in the upper layer."""
        return self.upper_sheet is not None

    def sheet_at(self, place: int) -> Sheet:
        """The sheet that an entry's place stands for."""
        if place < 0:
            assert self.upper_sheet is not None  # only an upper directory lists entries at -1
            return self.upper_sheet
        return self.sheets[place]

    def set_entry(self, name: bytes, node: Node) -> None:
        """Enter a node under `name`."""
        old = self.entries.get(name)
        if not isinstance(old, Node):
            self.known += 1
        self.entries[name] = node

    def drop_entry(self, name: bytes) -> None:
        """`name` is no longer in the directory."""
        if isinstance(self.entries.pop(name, None), Node):
            self.known -= 1

    def unknow_entry(self, name: bytes, place: int) -> None:
        """The kernel forgot the node under `name`; what remains is where to find it."""
        if isinstance(self.entries.get(name), Node):
            self.known -= 1
            if self.complete:
                self.entries[name] = place
            else:
                del self.entries[name]


@dataclass(slots=True)
class NodeTable:
    """All nodes by the number shown.

    Attributes:
        narrow: Numbers shown have 32 bits.
    """

    narrow: bool = False
    nodes: dict[int, Node] = field(default_factory=dict)
    _spares: int = 0
    _spare: dict[tuple[bool, int, int], Node] = field(default_factory=dict)

    def find(self, number: int, layer: Layer, host_ino: int, *, upper: bool) -> Node | None:
        """The live node that is this very file, or None when it has to be made."""
        node = self.nodes.get(self.shown(number))
        if (
            node is not None
            and self._is_same(node, host_ino, upper=upper)
            and (not self.narrow or node.number == number)
        ):
            return node
        if self._spare:
            return self._spare.get((upper, layer.salt, host_ino))
        return None

    @staticmethod
    def _is_same(node: Node, host_ino: int, *, upper: bool) -> bool:
        if node.dead and node.orphan_fd < 0 and node.upper:
            return False  # its host number may have been reused
        own = not node.sheets if isinstance(node, DirNode) else node.upper
        return own == upper and node.host_ino == host_ino

    def add(self, node: Node, layer: Layer, *, upper: bool) -> None:
        """Enter a new node; it gets a spare number when another live file has its own."""
        ino = self.shown(node.ino)
        if ino in self.nodes or (ino == ROOT_INO and self.nodes):
            self._spares += 1
            ino = (_NARROW if self.narrow else _SPARE_FIRST) + self._spares
            self._spare[(upper, layer.salt, node.host_ino)] = node
        if ino != node.ino:
            node.show(ino)
        self.nodes[ino] = node

    def shown(self, number: int) -> int:
        """The number that users see for a derived one, unless it is taken."""
        return narrow(number) if self.narrow else number

    def remove(self, node: Node) -> None:
        """The kernel has forgotten the node."""
        del self.nodes[node.ino]
        if self._spare and node.number != node.ino:
            for key, value in list(self._spare.items()):
                if value is node:
                    del self._spare[key]
        if node.orphan_fd >= 0:
            os.close(node.orphan_fd)
            node.orphan_fd = -1
