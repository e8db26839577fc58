"""Small directory trees, written down in a test as a mapping and made on disk.

    {
        "a": "text",                   a file (str or bytes)
        "d/": None,                    a directory; parents come by themselves
        "old/": OPAQUE,                a directory that hides the same one in the layers below
        "gone": WHITEOUT,              the absence of a name that the layers below have
        "s": Symlink("a"),
        "h": HardLink("a"),            a second name for a file of the same tree
        "d/exact": Node("text", mode=0o4755, uid=1000, xattrs={"user.x": b"1"}),
    }

A name may be bytes where it is not UTF-8.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType


@dataclass(frozen=True)
class Symlink:
    target: str | bytes


@dataclass(frozen=True)
class HardLink:
    to: str | bytes


@dataclass(frozen=True)
class Node:
    """An object with metadata of its own: `content` None makes a directory.

    `kind` is the type part of a mode; a FIFO or a device has no content and may have an `rdev`.
    """

    content: str | bytes | None = None
    kind: int = 0
    mode: int | None = None
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    mtime_ns: int | None = None
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


class Marker(Enum):
    WHITEOUT = "whiteout"
    OPAQUE = "opaque"


WHITEOUT = Marker.WHITEOUT
OPAQUE = Marker.OPAQUE

Content = str | bytes | Symlink | HardLink | Node | Marker | None
Tree = Mapping[str | bytes, Content] | Mapping[str, Content]
EMPTY: Tree = MappingProxyType({})


def make_tree(top: str | bytes | os.PathLike[str], tree: Tree) -> None:
    """Make the objects of `tree` below the existing directory `top`."""
    base = os.fsencode(top)
    made: list[tuple[bytes, Node]] = []
    for name, content in tree.items():
        path = os.path.join(base, os.fsencode(name).rstrip(b"/"))
        is_directory = content is None or content is OPAQUE
        assert is_directory == os.fsencode(name).endswith(b"/") or isinstance(content, Node), (
            f"{name!r}: directories, and nothing else, end with a slash"
        )
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _make(base, path, content)
        if isinstance(content, Node):
            made.append((path, content))
    # Metadata last and deepest first: making a child changes its directory's times.
    for path, node in sorted(made, reverse=True, key=lambda pair: pair[0].count(b"/")):
        _dress(path, node)


def _make(base: bytes, path: bytes, content: Content) -> None:
    match content:
        case None:
            os.makedirs(path, exist_ok=True)
        case str() | bytes():
            _write(path, content)
        case Symlink(target):
            os.symlink(os.fsencode(target), path)
        case HardLink(to):
            os.link(os.path.join(base, os.fsencode(to)), path, follow_symlinks=False)
        case Marker.WHITEOUT:
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        case Marker.OPAQUE:
            os.makedirs(path, exist_ok=True)
            os.setxattr(path, "trusted.overlay.opaque", b"y")
        case Node(content=None, kind=0 | stat.S_IFDIR):
            os.makedirs(path, exist_ok=True)
        case Node(content=None, kind=kind, rdev=rdev):
            os.mknod(path, kind | 0o644, rdev)
        case Node(content=text):
            _write(path, text)


def _write(path: bytes, content: str | bytes | None) -> None:
    with open(path, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content or b"")


def _dress(path: bytes, node: Node) -> None:
    """Give an object its metadata, in the order in which nothing undoes what came before."""
    if (node.uid, node.gid) != (0, 0):
        os.chown(path, node.uid, node.gid, follow_symlinks=False)
    if node.mode is not None:
        os.chmod(path, node.mode)
    for name, value in node.xattrs.items():
        os.setxattr(path, name, value, follow_symlinks=False)
    if node.mtime_ns is not None:
        os.utime(path, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)
