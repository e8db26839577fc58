"""The union without a mount: its verbs, and the books it keeps about what the kernel knows."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.support.trees import EMPTY, OPAQUE, WHITEOUT, HardLink, Symlink, Tree, make_tree
from tests.support.trees import Node as TreeNode
from unionfs import faults
from unionfs.inodes import DirNode, Node
from unionfs.layer import DirectoryLayer, FdCache
from unionfs.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from unionfs.tree import Caller, Changes, UnionTree
from unionfs.upper import open_upper
from unionfs.view import TreeOptions

pytestmark = pytest.mark.root

ROOT = Caller(0, 0, 0o022)
LARGE_BYTES = (1 << 20) + 1  # more than is copied within the event loop


class Kernel:
    """A tree and its only user, who keeps the books that the kernel keeps: references and open files.

    Paths are walked one look-up at a time, as the kernel does, and every reply that carries a node counts.
    """

    def __init__(self, base: Path, *, options: TreeOptions | None = None) -> None:
        self.base = base
        self.cache = FdCache(8)
        upper = open_upper(
            os.fsencode(base / "upper"),
            os.fsencode(base / "work"),
            cache=self.cache,
            volatile=False,
            prefer_user_xattrs=False,
        )
        lowers = []
        for index, path in enumerate(sorted(base.glob("lower*"))):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            name = os.fsencode(path)
            layer = DirectoryLayer(fd, name, index=index, dialect=upper.dialect, cache=self.cache)
            lowers.append(layer)
        if lowers:
            lowers[-1].bottom = True
        self.tree = UnionTree([*lowers], upper, options or TreeOptions(fsync=False))
        self.references: Counter[int] = Counter()
        self.open_files: list[Node] = []

    @property
    def upper(self) -> Path:
        return self.base / "upper"

    # --- requests --------------------------------------------------------------------------------------------

    def counted(self, node: Node) -> Node:
        node.lookups += 1
        self.references[node.ino] += 1
        return node

    def lookup(self, path: str) -> Node | None:
        node: Node = self.tree.root
        for part in os.fsencode(path).split(b"/"):
            if part:
                hit = self.tree.lookup(node, part) if isinstance(node, DirNode) else None
                if hit is None:
                    return None
                node = self.counted(hit[0])
        return node

    def get(self, path: str) -> Node:
        node = self.lookup(path)
        assert node is not None, path
        return node

    def directory(self, path: str) -> DirNode:
        node = self.get(path)
        assert isinstance(node, DirNode), path
        return node

    def place(self, path: str) -> tuple[DirNode, bytes]:
        """The directory and the last name of a path, both looked up before they are changed."""
        above, _, name = path.rpartition("/")
        self.lookup(path)
        return self.directory(above), os.fsencode(name)

    def create(self, path: str, content: bytes = b"") -> Node:
        parent, name = self.place(path)
        node, _ = self.tree.create(parent, name, 0o644, ROOT)
        assert node.file is not None
        node.file.users += 1
        os.pwrite(node.file.fd, content, 0)
        self.tree.release(self.counted(node))
        return node

    def mkdir(self, path: str) -> Node:
        parent, name = self.place(path)
        return self.counted(self.tree.mkdir(parent, name, 0o755, ROOT)[0])

    def symlink(self, path: str, target: bytes) -> Node:
        parent, name = self.place(path)
        return self.counted(self.tree.symlink(parent, name, target, ROOT)[0])

    async def link(self, path: str, to: str) -> Node:
        node = self.get(path)
        parent, name = self.place(to)
        await self.tree.link(node, parent, name)
        return self.counted(node)

    async def unlink(self, path: str) -> None:
        await self.tree.unlink(*self.place(path))

    def rmdir(self, path: str) -> None:
        self.tree.rmdir(*self.place(path))

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        await self.tree.rename(*self.place(old), *self.place(new), flags)

    async def open(self, path: str, flags: int) -> Node:
        node = self.get(path)
        await self.tree.open(node, flags)
        self.open_files.append(node)
        return node

    def release(self, node: Node) -> None:
        self.open_files.remove(node)
        self.tree.release(node)

    async def write(self, path: str, content: bytes, at: int = 0) -> None:
        node = await self.open(path, os.O_WRONLY)
        assert node.file is not None
        os.pwrite(node.file.fd, content, at)
        self.release(node)

    async def read(self, path: str) -> bytes:
        node = await self.open(path, os.O_RDONLY)
        content = contents(node)
        self.release(node)
        return content

    def forget(self, ino: int) -> None:
        self.tree.forget(ino, self.references.pop(ino))

    def forget_everything(self) -> None:
        for ino in list(self.references):
            self.forget(ino)

    # --- judging ---------------------------------------------------------------------------------------------

    def listing(self, path: str = "") -> list[str]:
        return sorted(os.fsdecode(name) for name in self.tree.names(self.directory(path)))

    async def dump(self, path: str = "") -> dict[str, tuple[object, ...]]:
        """All that the union shows below `path`: type, mode, links, inode number, contents."""
        shown: dict[str, tuple[object, ...]] = {}
        for name in self.listing(path):
            at = f"{path}/{name}" if path else name
            node = self.get(at)
            st = self.tree.stat(node)
            links = self.tree.link_count(node, st)
            fields = (stat.S_IFMT(st.st_mode), stat.S_IMODE(st.st_mode), node.ino)
            if isinstance(node, DirNode):
                shown[at] = fields
                shown.update(await self.dump(at))
            elif stat.S_ISLNK(st.st_mode):
                shown[at] = (*fields, links, self.tree.readlink(node))
            elif stat.S_ISREG(st.st_mode):
                shown[at] = (*fields, links, await self.read(at))
            else:
                shown[at] = (*fields, links)
        return shown

    def check_books(self) -> None:
        """What must hold between any two requests."""
        nodes = self.tree.table.nodes
        for ino, node in nodes.items():
            assert node.ino == ino
            assert node is self.tree.root or node.lookups == self.references[ino], node.name
            assert node.copying is None
            assert node.file is None or node.file.users == self.open_files.count(node) > 0
            for parent, name in node.names():
                assert parent.entries.get(name) is node, name
                assert nodes.get(parent.ino) is parent, name
            assert not (node.dead and node.names()), node.name
            if isinstance(node, DirNode):
                self._check_directory(node)

    def _check_directory(self, node: DirNode) -> None:
        entries = node.entries
        known = {name: entry for name, entry in entries.items() if isinstance(entry, Node)}
        assert node.known == len(known)
        for name, child in known.items():
            assert self.tree.table.nodes.get(child.ino) is child, name
            assert (node, name) in child.names()
        if node.complete and not node.dead:
            found = {name: self.tree.resolve(node, name) for name in entries}
            assert all(found.values()), "a listed name is not there"
            directories = [hit for hit in found.values() if hit and stat.S_ISDIR(hit.st.st_mode)]
            assert node.subdirectories == len(directories)

    def close(self) -> None:
        """Forget everything, and end."""
        for node in list(self.open_files):
            self.release(node)
        self.forget_everything()
        self.tree.close()
        self.cache.capacity = 0
        self.cache.trim()


def contents(node: Node) -> bytes:
    assert node.file is not None
    return os.pread(node.file.fd, 1 << 24, 0)


class Unions:
    """Makes the unions of one test; at its end each has empty books and a clean work directory."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._descriptors = len(os.listdir("/proc/self/fd"))
        self.made: list[Kernel] = []

    def __call__(
        self,
        lower: Tree | Sequence[Tree] = EMPTY,
        *,
        upper: Tree = EMPTY,
        options: TreeOptions | None = None,
    ) -> Kernel:
        lowers = [lower] if not isinstance(lower, Sequence) else lower
        base = self._scratch / f"union{len(self.made)}"
        trees = {f"lower{number}": tree for number, tree in enumerate(lowers)}
        for name, tree in {**trees, "upper": upper, "work": EMPTY}.items():
            (base / name).mkdir(parents=True)
            make_tree(base / name, tree)
        self.made.append(Kernel(base, options=options))
        return self.made[-1]

    def again(self, old: Kernel) -> Kernel:
        """End a union and read the same layers anew."""
        old.close()
        self.made.remove(old)
        self.made.append(Kernel(old.base))
        return self.made[-1]

    def finish(self) -> None:
        for kernel in self.made:
            kernel.check_books()
            kernel.close()
            assert list(kernel.tree.table.nodes.values()) == [kernel.tree.root]
            assert list((kernel.base / "work/work").iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) == self._descriptors


@pytest.fixture
async def union(scratch: Path, request: pytest.FixtureRequest) -> AsyncIterator[Unions]:
    unions = Unions(scratch)
    yield unions
    faults.arm(None)
    unions.finish()


def is_whiteout(path: Path) -> bool:
    return stat.S_ISCHR(path.lstat().st_mode) and path.lstat().st_rdev == 0


def refused(number: int) -> pytest.RaisesExc[OSError]:
    """The request fails with this errno."""
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def dressed_tree() -> Tree:
    d = TreeNode(
        mode=0o2751, uid=1000, gid=1001, mtime_ns=1_000_000_001, xattrs={"user.a": b"value"}
    )
    return {"d": d, "d/deep/": None}


@asynccontextmanager
async def copying_held_up(k: Kernel, node: Node) -> AsyncIterator[None]:
    """Inside, the copy-up of `node` that was just started waits before its thread begins."""
    limiter = k.tree._copy_limiter
    borrowers = [object() for _ in range(int(limiter.total_tokens))]
    for borrower in borrowers:
        limiter.acquire_on_behalf_of_nowait(borrower)
    await trio.testing.wait_all_tasks_blocked()
    assert node.copying is not None
    yield
    for borrower in borrowers:
        limiter.release_on_behalf_of(borrower)


# --- looking up and listing --------------------------------------------------------------------------------------


async def test_two_lookups_give_one_node(union: Unions):
    k = union({"a": "text"})
    assert k.get("a") is k.get("a")


async def test_absent_name_is_nothing(union: Unions):
    assert union({"a": ""}).lookup("b") is None


async def test_name_that_is_too_long_is_refused(union: Unions):
    k = union()
    with refused(errno.ENAMETOOLONG):
        k.lookup("n" * 256)


async def test_name_of_a_marker_is_nothing(union: Unions):
    assert union({".wh.a": "", "b": ""}).lookup(".wh.a") is None


@pytest.mark.parametrize(
    ("upper", "lowers", "names"),
    [
        ({"a": ""}, [{"b": ""}], ["a", "b"]),
        ({"a": ""}, [{"a": "", "b": ""}], ["a", "b"]),
        ({"a": WHITEOUT}, [{"a": "", "b": ""}], ["b"]),
        (EMPTY, [{"a": WHITEOUT}, {"a": ""}], []),
        (EMPTY, [{".wh.a": ""}, {"a": "", "b": ""}], ["b"]),
        ({"a": ""}, [{"a": WHITEOUT}, {"a": ""}], ["a"]),
        (EMPTY, [{"a": ""}, {"b": ""}, {"c": ""}], ["a", "b", "c"]),
    ],
)
async def test_listing_is_the_union_of_all_layers(
    union: Unions, upper: Tree, lowers: list[Tree], names: list[str]
):
    assert union(lowers, upper=upper).listing() == names


async def test_opaque_directory_lists_what_is_its_own(union: Unions):
    k = union({"d/old": ""}, upper={"d/": OPAQUE, "d/new": ""})
    assert k.listing("d") == ["new"]


async def test_directory_hidden_in_the_middle_is_not_merged_across(union: Unions):
    k = union([{"d/top": ""}, {"d": WHITEOUT}, {"d/bottom": ""}])
    assert k.listing("d") == ["top"]


async def test_listing_and_lookups_agree(union: Unions):
    k = union(
        [{"a": "1", "b": WHITEOUT, "d/x": ""}, {"b": "", "c": "", "d/y": "", "e": WHITEOUT}],
        upper={"c": WHITEOUT, "e": "", "d/z": ""},
    )
    for folder in ("", "d/"):
        found = [name for name in "abcdexyz" if k.lookup(folder + name) is not None]
        assert k.listing(folder) == found


# --- making ------------------------------------------------------------------------------------------------------


async def test_created_file_is_in_the_upper_alone(union: Unions):
    k = union({"d/a": ""})
    k.create("d/new", b"text")
    assert (k.upper / "d/new").read_text() == "text"
    assert os.listdir(k.base / "lower0/d") == ["a"]


async def test_directory_copied_up_for_a_new_entry_keeps_mode_owner_and_attributes(union: Unions):
    k = union(dressed_tree())
    k.create("d/new")
    st = (k.upper / "d").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (0o2751, 1000, 1001)
    assert os.getxattr(k.upper / "d", "user.a") == b"value"


async def test_parents_copied_up_keep_their_times(union: Unions):
    k = union(dressed_tree())
    k.create("d/deep/new")
    assert (k.upper / "d").stat().st_mtime_ns == 1_000_000_001


async def test_creating_over_a_whiteout_replaces_it(union: Unions):
    k = union({"a": "old"}, upper={"a": WHITEOUT})
    k.create("a", b"new")
    assert (k.upper / "a").read_text() == "new"


@pytest.mark.parametrize("path", ["here", "below", "d"])
async def test_creating_what_is_there_is_refused(union: Unions, path: str):
    k = union({"below": "", "d/": None}, upper={"here": ""})
    with refused(errno.EEXIST):
        k.create(path)


@pytest.mark.parametrize(
    ("name", "number"),
    [(".wh.a", errno.EINVAL), (".wh..wh..opq", errno.EINVAL), ("n" * 256, errno.ENAMETOOLONG)],
)
async def test_name_that_cannot_be_kept_is_refused(union: Unions, name: str, number: int):
    k = union()
    with refused(number):
        k.tree.create(k.tree.root, os.fsencode(name), 0o644, ROOT)


async def test_creating_in_a_removed_directory_is_refused(union: Unions):
    k = union({"d/": None})
    d = k.directory("d")
    k.rmdir("d")
    with refused(errno.ENOENT):
        k.tree.create(d, b"a", 0o644, ROOT)


async def test_directory_made_over_a_whiteout_shows_nothing_old(union: Unions):
    k = union({"d/old": ""}, upper={"d": WHITEOUT})
    k.mkdir("d")
    assert k.listing("d") == []
    assert os.getxattr(k.upper / "d", "trusted.overlay.opaque") == b"y"


async def test_whiteout_device_cannot_be_made_by_a_user(union: Unions):
    k = union()
    with refused(errno.EPERM):
        k.tree.mknod(k.tree.root, b"a", stat.S_IFCHR | 0o600, 0, ROOT)


async def test_failed_creation_leaves_the_whiteout(union: Unions):
    k = union({"a": "old"}, upper={"a": WHITEOUT})
    faults.arm("create.staged:ENOSPC")
    with refused(errno.ENOSPC):
        k.create("a")
    assert is_whiteout(k.upper / "a")
    k.check_books()


# --- removing ----------------------------------------------------------------------------------------------------


async def test_unlink_of_a_lower_file_leaves_a_whiteout(union: Unions):
    k = union({"a": "text"})
    await k.unlink("a")
    assert is_whiteout(k.upper / "a")
    assert k.lookup("a") is None


async def test_unlink_of_an_upper_file_leaves_nothing(union: Unions):
    k = union(upper={"a": "text"})
    await k.unlink("a")
    assert os.listdir(k.upper) == []


async def test_unlink_of_an_upper_file_above_a_lower_one_leaves_a_whiteout(union: Unions):
    k = union({"a": "old"}, upper={"a": "new"})
    await k.unlink("a")
    assert is_whiteout(k.upper / "a")


async def test_unlink_above_a_lower_whiteout_leaves_nothing(union: Unions):
    k = union([{"a": WHITEOUT}, {"a": "old"}], upper={"a": "new"})
    await k.unlink("a")
    assert os.listdir(k.upper) == []


@pytest.mark.parametrize("where", ["lower", "upper"])
async def test_unlinked_open_file_is_read_to_the_end(union: Unions, where: str):
    k = union({"a": "text"}) if where == "lower" else union(upper={"a": "text"})
    node = await k.open("a", os.O_RDONLY)
    await k.unlink("a")
    assert contents(node) == b"text"
    assert k.tree.link_count(node, k.tree.stat(node)) == 0
    k.release(node)


@pytest.mark.parametrize(
    ("path", "number"), [("d", errno.EISDIR), ("missing", errno.ENOENT), ("gone", errno.ENOENT)]
)
async def test_unlink_of_what_is_no_file_is_refused(union: Unions, path: str, number: int):
    k = union({"d/": None, "gone": ""}, upper={"gone": WHITEOUT})
    with refused(number):
        await k.unlink(path)


async def test_removed_lower_directory_leaves_a_whiteout(union: Unions):
    k = union({"d/": None})
    k.rmdir("d")
    assert is_whiteout(k.upper / "d")


async def test_merged_directory_emptied_by_whiteouts_can_be_removed(union: Unions):
    k = union({"d/a": ""}, upper={"d/": None})
    await k.unlink("d/a")
    k.rmdir("d")
    assert is_whiteout(k.upper / "d")


@pytest.mark.parametrize(
    ("path", "number"),
    [("d", errno.ENOTEMPTY), ("f", errno.ENOTDIR), ("missing", errno.ENOENT)],
)
async def test_rmdir_of_what_is_no_empty_directory_is_refused(
    union: Unions, path: str, number: int
):
    k = union({"d/a": "", "f": ""})
    with refused(number):
        k.rmdir(path)


async def test_removed_directory_is_still_there_for_who_is_in_it(union: Unions):
    k = union(upper={"d/": None})
    d = k.directory("d")
    number = k.tree.stat(d).st_ino
    k.rmdir("d")
    for _ in range(2):
        assert k.tree.stat(d).st_ino == number
        k.cache.capacity = 0
        k.cache.trim()


# --- renaming ----------------------------------------------------------------------------------------------------


async def test_renamed_lower_file_keeps_its_number_and_contents(union: Unions):
    k = union({"a": "text"})
    number = k.get("a").ino
    await k.rename("a", "b")
    assert (k.get("b").ino, await k.read("b")) == (number, b"text")
    assert k.lookup("a") is None
    assert is_whiteout(k.upper / "a")


async def test_renamed_lower_directory_goes_on_showing_its_entries(union: Unions):
    k = union({"d/deep/a": "text"})
    await k.rename("d", "e")
    assert await k.read("e/deep/a") == b"text"
    assert os.getxattr(k.upper / "e", "trusted.overlay.redirect") == b"/d"


async def test_without_redirects_a_lower_directory_cannot_be_renamed(union: Unions):
    k = union({"d/a": ""}, options=TreeOptions(redirect=False, fsync=False))
    with refused(errno.EXDEV):
        await k.rename("d", "e")


async def test_directory_renamed_onto_another_lower_name_shows_only_its_own(union: Unions):
    k = union({"e/old": ""}, upper={"d/new": "", "e": WHITEOUT})
    await k.rename("d", "e")
    assert k.listing("e") == ["new"]


async def test_exchange_swaps_a_file_and_a_directory(union: Unions):
    k = union({"a": "text", "d/x": "deep"})
    await k.rename("a", "d", RENAME_EXCHANGE)
    assert (await k.read("d"), await k.read("a/x")) == (b"text", b"deep")


async def test_replaced_file_is_read_by_who_has_it_open(union: Unions):
    k = union({"a": "new", "b": "old"})
    old = await k.open("b", os.O_RDONLY)
    await k.rename("a", "b")
    assert (contents(old), await k.read("b")) == (b"old", b"new")
    k.release(old)


@pytest.mark.parametrize(
    ("old", "new", "flags", "number"),
    [
        ("missing", "x", 0, errno.ENOENT),
        ("a", "b", RENAME_NOREPLACE, errno.EEXIST),
        ("a", "missing", RENAME_EXCHANGE, errno.ENOENT),
        ("a", "d", 0, errno.EISDIR),
        ("d", "a", 0, errno.ENOTDIR),
        ("d", "full", 0, errno.ENOTEMPTY),
        ("a", ".wh.x", 0, errno.EINVAL),
        ("a", "n" * 256, 0, errno.ENAMETOOLONG),
        ("a", "b", 1 << 10, errno.EINVAL),
    ],
)
async def test_rename_that_rename_2_refuses(
    union: Unions, old: str, new: str, flags: int, number: int
):
    k = union({"a": "", "b": "", "d/": None, "full/x": ""})
    parent = k.tree.root
    for path in ("a", "b", "d", "full"):
        k.lookup(path)
    with refused(number):
        await k.tree.rename(parent, os.fsencode(old), parent, os.fsencode(new), flags)
    assert os.listdir(k.upper) == []


async def test_rename_to_another_name_of_the_same_file_does_nothing(union: Unions):
    k = union({"a": "text", "b": HardLink("a")})
    await k.rename("a", "b")
    assert k.listing() == ["a", "b"]


# --- copy-up -----------------------------------------------------------------------------------------------------


async def test_writing_changes_the_upper_and_not_the_lower(union: Unions):
    k = union({"a": "text"})
    await k.write("a", b"T")
    assert (k.upper / "a").read_text() == "Text"
    assert (k.base / "lower0/a").read_text() == "text"


async def test_copied_up_file_keeps_its_node_and_number(union: Unions):
    k = union({"a": "text"})
    node = k.get("a")
    number = node.ino
    await k.write("a", b"T")
    assert k.get("a") is node
    assert (node.ino, node.upper) == (number, True)


async def test_handle_opened_before_a_copy_up_sees_what_is_written_after(union: Unions):
    k = union({"a": "text"})
    reader = await k.open("a", os.O_RDONLY)
    await k.write("a", b"TEXT")
    assert contents(reader) == b"TEXT"
    k.release(reader)


async def test_opening_to_read_copies_nothing(union: Unions):
    k = union({"a": "text"})
    await k.read("a")
    assert os.listdir(k.upper) == []


async def test_truncating_open_copies_no_data(union: Unions):
    k = union({"a": "text"})
    k.release(await k.open("a", os.O_WRONLY | os.O_TRUNC))
    assert (k.upper / "a").read_bytes() == b""


async def test_change_of_mode_copies_the_metadata_alone(union: Unions):
    k = union({"a": "text"})
    await k.tree.setattr(k.get("a"), Changes(mode=0o600))
    assert (k.upper / "a").stat().st_blocks == 0
    assert await k.read("a") == b"text"


async def test_metadata_copy_gets_its_data_when_it_is_written(union: Unions):
    k = union({"a": "text"})
    await k.tree.setattr(k.get("a"), Changes(mode=0o600))
    await k.write("a", b"T")
    assert (k.upper / "a").read_text() == "Text"
    assert "trusted.overlay.metacopy" not in os.listxattr(k.upper / "a")


async def test_all_names_of_a_hard_linked_file_see_a_change(union: Unions):
    k = union({"a": "text", "d/b": HardLink("a")})
    await k.write("a", b"T")
    assert await k.read("d/b") == b"Text"
    assert k.get("a") is k.get("d/b")


async def test_link_count_of_a_lower_file_goes_down_with_each_name(union: Unions):
    k = union({"a": "text", "b": HardLink("a"), "c": HardLink("a")})
    node = k.get("a")
    counts = []
    for name in ("b", "a"):
        await k.unlink(name)
        counts.append(k.tree.link_count(node, k.tree.stat(node)))
    assert counts == [2, 1]
    assert await k.read("c") == b"text"


async def test_link_to_a_lower_file_is_one_file(union: Unions):
    k = union({"a": "text"})
    await k.link("a", "b")
    await k.write("b", b"T")
    assert await k.read("a") == b"Text"
    assert (k.upper / "a").stat().st_ino == (k.upper / "b").stat().st_ino


async def test_removed_open_file_can_be_copied_up(union: Unions):
    k = union({"a": "text"})
    node = await k.open("a", os.O_RDONLY)
    await k.unlink("a")
    await k.tree.open(node, os.O_WRONLY)
    k.open_files.append(node)
    assert node.file is not None
    os.pwrite(node.file.fd, b"T", 0)
    assert contents(node) == b"Text"
    assert is_whiteout(k.upper / "a")
    k.release(node)
    k.release(node)


@pytest.mark.parametrize("point", ["copyup.data", "copyup.staged", "copyup.published"])
async def test_failed_copy_up_leaves_a_file_that_can_be_read_and_copied_again(
    union: Unions, point: str
):
    k = union({"a": "text"})
    faults.arm(f"{point}:EIO")
    with refused(errno.EIO):
        await k.open("a", os.O_WRONLY)
    faults.arm(None)
    k.check_books()
    assert await k.read("a") == b"text"
    await k.write("a", b"T")
    assert await k.read("a") == b"Text"


async def test_read_only_union_refuses_to_copy_up(union: Unions):
    k = union({"a": "text"}, options=TreeOptions(read_only=True))
    with refused(errno.EROFS):
        await k.open("a", os.O_WRONLY)


async def test_user_attribute_that_looks_like_a_marker_is_only_an_attribute(union: Unions):
    k = union({"d/a": ""})
    d = k.directory("d")
    await k.tree.setxattr(d, b"trusted.overlay.opaque", b"y")
    assert k.tree.listxattr(d) == [b"trusted.overlay.opaque"]
    assert union.again(k).listing("d") == ["a"]


# --- at the same time --------------------------------------------------------------------------------------------


async def test_two_writers_of_a_large_file_copy_it_once(union: Unions):
    k = union({"a": "x" * LARGE_BYTES})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(k.write, "a", b"1", 0)
        nursery.start_soon(k.write, "a", b"2", 1)
    assert (await k.read("a"))[:3] == b"12x"


async def test_file_removed_while_it_is_copied_up_stays_removed(union: Unions):
    k = union({"a": "x" * LARGE_BYTES})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(k.write, "a", b"1")
        async with copying_held_up(k, k.get("a")):
            await k.unlink("a")
    assert k.lookup("a") is None
    assert is_whiteout(k.upper / "a")


async def test_file_renamed_while_it_is_copied_up_is_written_under_its_new_name(union: Unions):
    k = union({"a": "x" * LARGE_BYTES})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(k.write, "a", b"1")
        async with copying_held_up(k, k.get("a")):
            nursery.start_soon(k.rename, "a", "b")
            await trio.testing.wait_all_tasks_blocked()
    assert (await k.read("b"))[:2] == b"1x"
    assert k.listing() == ["b"]


async def test_file_forgotten_while_it_is_copied_up_is_kept(union: Unions):
    k = union({"a": "x" * LARGE_BYTES})
    node = k.get("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(k.write, "a", b"1")
        async with copying_held_up(k, node):
            k.forget_everything()
    assert (k.upper / "a").stat().st_size == LARGE_BYTES
    assert (await k.read("a"))[:2] == b"1x"


# --- forgetting --------------------------------------------------------------------------------------------------


TALL = {"a/b/c/file": "1", "a/b/link": Symlink("c"), "a/x": "2", "y": "3"}


@pytest.mark.parametrize("order", ["parents first", "children first", "any"])
async def test_forgetting_everything_leaves_the_root(union: Unions, order: str):
    k = union(TALL, upper={"a/b/up": ""})
    await k.dump()
    numbers = list(k.references)
    if order == "children first":
        numbers.reverse()
    elif order == "any":
        random.Random(3).shuffle(numbers)
    for number in numbers:
        k.forget(number)
        k.check_books()
    assert list(k.tree.table.nodes.values()) == [k.tree.root]


async def test_forgotten_names_are_still_listed(union: Unions):
    k = union(TALL, upper={"a/b/up": ""})
    before = await k.dump()
    k.forget_everything()
    assert await k.dump() == before


async def test_partly_forgotten_node_stays(union: Unions):
    k = union({"a": ""})
    node = k.get("a")
    k.get("a")
    k.tree.forget(node.ino, 1)
    k.references[node.ino] -= 1
    assert k.tree.node(node.ino) is node


async def test_unknown_number_is_stale(union: Unions):
    k = union({"a": ""})
    number = k.get("a").ino
    k.forget(number)
    with refused(errno.ESTALE):
        k.tree.node(number)


async def test_root_is_never_forgotten(union: Unions):
    k = union({"a": ""})
    k.tree.forget(k.tree.root.ino, 100)
    assert k.listing() == ["a"]


async def test_open_file_outlives_its_forgetting(union: Unions):
    k = union({"a": "text"})
    node = await k.open("a", os.O_RDONLY)
    k.forget_everything()
    assert contents(node) == b"text"
    k.release(node)
    assert list(k.tree.table.nodes.values()) == [k.tree.root]


@pytest.mark.parametrize("where", ["lower", "upper"])
async def test_removed_file_goes_with_the_last_reference(union: Unions, where: str):
    k = union({"a": "text"}) if where == "lower" else union(upper={"a": "text"})
    number = k.get("a").ino
    await k.unlink("a")
    assert number in k.tree.table.nodes
    k.forget_everything()
    assert list(k.tree.table.nodes.values()) == [k.tree.root]


async def test_forgetting_a_directory_whose_entries_are_known_does_not_lose_them(union: Unions):
    k = union({"d/a": "text"})
    node = k.get("d/a")
    k.forget(k.get("d").ino)
    assert node.parent is not None
    assert k.get("d/a") is node


async def test_number_of_a_forgotten_copied_up_file_is_still_the_lower_ones(union: Unions):
    k = union({"a": "text"})
    number = k.get("a").ino
    await k.write("a", b"T")
    k.forget_everything()
    assert k.get("a").ino == number


async def test_descriptors_of_many_directories_stay_few(union: Unions):
    k = union({f"{number}/{deep}/": None for number in range(20) for deep in range(3)})
    before = len(os.listdir("/proc/self/fd"))
    await k.dump()
    k.cache.trim()
    assert len(os.listdir("/proc/self/fd")) <= before + k.cache.capacity


async def test_directory_whose_replacement_failed_keeps_no_descriptor(union: Unions):
    k = union({"d/": None, "e/x": ""}, upper={"e/": None})
    await k.unlink("e/x")
    faults.arm("rename.prepared:EIO")
    with refused(errno.EIO):
        await k.rename("d", "e")
    before = len(os.listdir("/proc/self/fd"))
    k.forget_everything()
    assert len(os.listdir("/proc/self/fd")) < before


# --- anything at all ---------------------------------------------------------------------------------------------


NAMES = ("a", "b", "c")
FOLDERS = ("", "d/", "e/", "d/e/")
VARIED = [
    {"a": "1a", "d/a": "1da", "d/b": Symlink("a"), "e": WHITEOUT, "d/h": HardLink("a")},
    {"b": "2b", "e/c": "2ec", "d/e/a": "2dea", "d/e/b": HardLink("b"), "c": HardLink("b")},
]


async def take_a_step(k: Kernel, chance: random.Random) -> None:
    """One request of any kind on any paths; those that POSIX refuses are tried as well."""
    paths = [folder + name for folder in FOLDERS for name in (*NAMES, "d", "e")]
    path, other = chance.choice(paths), chance.choice(paths)
    for at in (path, other):
        if not isinstance(k.lookup(at.rpartition("/")[0]), DirNode):
            return
    await chance.choice((make_something, make_something, remove, move, move, change))(
        k, chance, path, other
    )


async def make_something(k: Kernel, chance: random.Random, path: str, other: str) -> None:
    node = k.lookup(other)
    match chance.randrange(4):
        case 0:
            k.create(path, b"new")
        case 1:
            k.mkdir(path)
        case 2:
            k.symlink(path, b"target")
        case _ if node is not None and not node.is_directory:
            await k.link(other, path)


async def remove(k: Kernel, chance: random.Random, path: str, other: str) -> None:
    if chance.random() < 0.6:
        await k.unlink(path)
    else:
        k.rmdir(other)


async def move(k: Kernel, chance: random.Random, path: str, other: str) -> None:
    await k.rename(path, other, chance.choice((0, 0, RENAME_EXCHANGE)))


async def change(k: Kernel, chance: random.Random, path: str, _other: str) -> None:
    node = k.lookup(path)
    if node is None or chance.random() < 0.3:
        for number in chance.sample(list(k.references), len(k.references) // 2):
            k.forget(number)
    elif node.kind == stat.S_IFREG and chance.random() < 0.5:
        await k.write(path, b"W")
    elif node.kind != stat.S_IFLNK:
        await k.tree.setattr(node, Changes(mode=chance.choice((0o700, 0o755))))


@pytest.mark.parametrize("seed", range(12))
async def test_after_any_requests_the_books_are_right_and_the_layers_say_the_same(
    union: Unions, seed: int
):
    chance = random.Random(seed)
    k = union(VARIED, upper={"d/c": "uc"})
    allowed = {errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR}
    for _ in range(200):
        try:
            await take_a_step(k, chance)
        except OSError as error:
            if error.errno not in allowed | {errno.EINVAL}:
                raise
        k.check_books()
        k.cache.trim()
    before = await k.dump()
    assert await union.again(k).dump() == before
