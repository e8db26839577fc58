"""The upper layer: who may open one, what is swept, and that what is published appears in one step."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.trees import EMPTY, WHITEOUT, HardLink, Node, Symlink, Tree, make_tree
from unionfs import faults
from unionfs.errors import SetupError
from unionfs.layer import DirectorySheet, FdCache
from unionfs.markers import TRUSTED_PREFIX, USER_PREFIX
from unionfs.upper import Upper, open_upper, remove_tree

pytestmark = pytest.mark.root


class Place:
    """An upper directory and its work directory, opened and closed by the test."""

    def __init__(self, scratch: Path) -> None:
        self.upper_dir = scratch / "upper"
        self.work_dir = scratch / "work"
        self.upper_dir.mkdir()
        self.work_dir.mkdir()
        self.cache = FdCache(100)
        self._open: list[Upper] = []

    @property
    def staging(self) -> Path:
        return self.work_dir / "work"

    @property
    def links(self) -> Path:
        return self.work_dir / "links"

    def open(
        self,
        upper: Path | None = None,
        work: Path | None = None,
        *,
        volatile: bool = False,
        prefer_user_xattrs: bool = False,
    ) -> Upper:
        made = open_upper(
            os.fsencode(upper or self.upper_dir),
            os.fsencode(work or self.work_dir),
            cache=self.cache,
            volatile=volatile,
            prefer_user_xattrs=prefer_user_xattrs,
        )
        self._open.append(made)
        return made

    def close(self) -> None:
        self.cache.capacity = 0
        self.cache.trim()
        self.cache.capacity = 100
        while self._open:
            self._open.pop().close()


@pytest.fixture
def place(scratch: Path) -> Iterator[Place]:
    made = Place(scratch)
    yield made
    made.close()


@pytest.fixture(params=["devices", "files"])
def upper(place: Place, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Upper:
    """An upper that spells its whiteouts as devices, and one that spells them as `.wh.` files."""
    if request.param == "files":
        monkeypatch.setenv("FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT", "1")
    return place.open()


@pytest.fixture
def strike() -> Iterator[None]:
    """Whatever fault a test arms is disarmed at its end."""
    yield
    faults.arm(None)


def is_whiteout(path: Path) -> bool:
    return stat.S_ISCHR(path.lstat().st_mode) and path.lstat().st_rdev == 0


def hides(folder: Path, name: str) -> bool:
    """Whether the folder holds a whiteout of `name`, and nothing under the name itself."""
    if (folder / f".wh.{name}").exists():
        return not (folder / name).exists()
    return (folder / name).exists() and is_whiteout(folder / name)


def sub(upper: Upper, name: bytes) -> DirectorySheet:
    return upper.root.child(name)


# --- who may open one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "does not exist"), ("file", "is not a directory")]
)
def test_unfit_upper_is_named_with_the_reason(place: Place, scratch: Path, name: str, reason: str):
    (scratch / "file").touch()
    with pytest.raises(SetupError) as refused:
        place.open(upper=scratch / name)
    assert str(refused.value) == f"upper directory {scratch / name} {reason}: check upperdir="


@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "does not exist"), ("file", "is not a directory")]
)
def test_unfit_work_is_named_with_the_reason(place: Place, scratch: Path, name: str, reason: str):
    (scratch / "file").touch()
    with pytest.raises(SetupError) as refused:
        place.open(work=scratch / name)
    assert str(refused.value) == f"work directory {scratch / name} {reason}: check workdir="


def test_upper_and_work_on_two_file_systems_are_refused(place: Place):
    subprocess.run(["mount", "-t", "tmpfs", "none", place.work_dir], check=True)
    try:
        with pytest.raises(SetupError) as refused:
            place.open()
    finally:
        subprocess.run(["umount", place.work_dir], check=True)
    assert str(refused.value) == (
        f"upper directory {place.upper_dir} and work directory {place.work_dir} are on different file "
        "systems: put workdir= beside upperdir="
    )


@pytest.mark.parametrize(
    ("upper", "work"),
    [("upper", "upper"), ("upper", "upper/in"), ("work/in", "work"), ("link", "upper")],
)
def test_upper_and_work_inside_one_another_are_refused(
    place: Place, scratch: Path, upper: str, work: str
):
    (place.upper_dir / "in").mkdir()
    (place.work_dir / "in").mkdir()
    (scratch / "link").symlink_to("upper")
    with pytest.raises(SetupError) as refused:
        place.open(upper=scratch / upper, work=scratch / work)
    assert str(refused.value) == (
        f"work directory {scratch / work} and upper directory {scratch / upper} lie inside one another: "
        "choose separate directories"
    )


def test_work_beside_an_upper_whose_name_it_starts_with_is_allowed(place: Place, scratch: Path):
    (scratch / "upper-work").mkdir()
    place.open(work=scratch / "upper-work")


def test_upper_that_another_mount_uses_is_refused(place: Place, scratch: Path):
    (scratch / "other").mkdir()
    place.open()
    with pytest.raises(SetupError) as refused:
        place.open(work=scratch / "other")
    assert str(refused.value) == (
        f"upper directory {place.upper_dir} is busy: another mount uses it; unmount that, or choose another"
    )


def test_work_that_another_mount_uses_is_refused(place: Place, scratch: Path):
    (scratch / "other").mkdir()
    place.open()
    with pytest.raises(SetupError) as refused:
        place.open(upper=scratch / "other")
    assert str(refused.value) == (
        f"work directory {place.work_dir} is busy: another mount uses it; unmount that, or choose another"
    )


def test_lock_ends_with_the_upper(place: Place):
    place.open()
    place.close()
    place.open()


def test_refused_mount_leaves_neither_lock_nor_descriptor(place: Place, scratch: Path):
    (scratch / "other").mkdir()
    place.open()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SetupError):
        place.open(work=scratch / "other")
    assert len(os.listdir("/proc/self/fd")) == before
    place.close()
    place.open(work=scratch / "other")


def test_upper_on_a_read_only_file_system_is_refused(place: Place, scratch: Path):
    subprocess.run(["mount", "--bind", scratch, scratch], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", scratch], check=True)
        with pytest.raises(SetupError) as refused:
            place.open()
    finally:
        subprocess.run(["umount", "--lazy", scratch], check=True)
    assert str(refused.value) == (
        f"upper directory {place.upper_dir} cannot be written: Read-only file system"
    )


def test_upper_that_was_volatile_is_refused(place: Place):
    place.open(volatile=True)
    place.close()
    with pytest.raises(SetupError) as refused:
        place.open()
    assert str(refused.value) == (
        f"work directory {place.work_dir} was last mounted volatile and may have lost data in a crash: "
        "use a fresh upper, or remove its work/incompat/volatile if you trust it"
    )


def test_volatile_upper_is_opened_once_its_mark_is_removed(place: Place):
    place.open(volatile=True)
    place.close()
    (place.staging / "incompat/volatile").rmdir()
    place.open()


# --- what it finds out -------------------------------------------------------------------------------------------


def test_root_writes_markers_as_overlayfs_does(place: Place):
    dialect = place.open().dialect
    assert (dialect.prefix, dialect.xattrs, dialect.devices) == (TRUSTED_PREFIX, True, True)


def test_option_userxattr_chooses_the_other_prefix(place: Place):
    assert place.open(prefer_user_xattrs=True).dialect.prefix == USER_PREFIX


def test_environment_of_fuse_overlayfs_chooses_whiteout_files(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT", "1")
    assert not place.open().dialect.devices


def test_finding_out_leaves_nothing(place: Place):
    place.open()
    assert list(place.staging.iterdir()) == []
    assert list(place.upper_dir.iterdir()) == []


# --- the sweep ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leftover",
    [
        {"#1": "half a file"},
        {"#1": WHITEOUT},
        {"#1/": None},
        {"#1/a/b": "text", "#1/a/c": WHITEOUT, "#1/d/": None},
        {"#1": Symlink("/nowhere")},
        {"#1": Node(kind=stat.S_IFIFO)},
        {"#1/new": "", "#2": "", "#f": ""},
    ],
)
def test_leftovers_of_a_crash_are_swept(place: Place, leftover: Tree):
    place.staging.mkdir()
    make_tree(place.staging, leftover)
    place.open()
    assert list(place.staging.iterdir()) == []


def test_sweep_does_not_follow_links(place: Place, scratch: Path):
    make_tree(scratch, {"outside/precious": "text"})
    place.staging.mkdir()
    outside = str(scratch / "outside")
    make_tree(place.staging, {"#1": Symlink(outside), "#2/in": Symlink(outside)})
    place.open()
    assert (scratch / "outside/precious").read_text() == "text"


def test_staging_directory_that_is_a_link_is_refused(place: Place, scratch: Path):
    make_tree(scratch, {"outside/precious": "text"})
    place.staging.symlink_to(scratch / "outside")
    with pytest.raises(SetupError):
        place.open()
    assert (scratch / "outside/precious").read_text() == "text"


def test_index_is_kept_and_known(place: Place):
    make_tree(place.work_dir, {"links/00000000000000aa": ""})
    assert place.open().indexed == {b"00000000000000aa"}


def test_upper_itself_is_not_swept(place: Place):
    make_tree(place.upper_dir, {"a": "text", "#1": "a user's file", "gone": WHITEOUT})
    place.open()
    assert sorted(os.listdir(place.upper_dir)) == ["#1", "a", "gone"]


def test_times_that_a_crash_left_changed_are_restored(place: Place):
    make_tree(place.work_dir, {"links/00000000000000aa": "", "work/times-00000000000000aa": ""})
    os.utime(place.staging / "times-00000000000000aa", ns=(1111, 2222))
    place.open()
    st = (place.links / "00000000000000aa").stat()
    assert (st.st_atime_ns, st.st_mtime_ns) == (1111, 2222)
    assert list(place.staging.iterdir()) == []


def test_note_of_times_for_a_file_that_is_gone_is_swept(place: Place):
    make_tree(place.work_dir, {"work/times-00000000000000aa": ""})
    place.open()
    assert list(place.staging.iterdir()) == []


# --- staging -----------------------------------------------------------------------------------------------------


def test_names_in_the_staging_directory_are_not_used_twice(place: Place):
    upper = place.open()
    assert len({upper.stage_name() for _ in range(100)}) == 100


def test_staged_object_is_removed_on_an_error(place: Place):
    upper = place.open()

    def fail() -> None:
        with upper.staged() as name:
            make_tree(place.staging, {name + b"/deep/file": ""})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(place.staging.iterdir()) == []


def test_error_of_a_published_object_is_the_first_one(place: Place):
    upper = place.open()

    def fail() -> None:
        with upper.staged() as name:
            make_tree(place.staging, {name: ""})
            os.rename(place.staging / os.fsdecode(name), place.upper_dir / "a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(place.upper_dir) == ["a"]


@pytest.mark.parametrize(
    "tree", [{"a": ""}, {"a/b/c": "", "a/d": WHITEOUT}, {"a/": None}, {"a": Symlink("/")}]
)
def test_tree_is_removed_whole(scratch: Path, tree: Tree):
    make_tree(scratch, tree)
    fd = os.open(scratch, os.O_RDONLY)
    try:
        remove_tree(fd, b"a")
    finally:
        os.close(fd)
    assert list(scratch.iterdir()) == []


# --- whiteouts ---------------------------------------------------------------------------------------------------


def test_put_whiteout_hides_a_name(place: Place, upper: Upper):
    upper.put_whiteout(upper.root, b"a")
    assert hides(place.upper_dir, "a")


def test_whiteout_device_is_what_overlayfs_makes(place: Place):
    upper = place.open()
    upper.put_whiteout(upper.root, b"a")
    assert is_whiteout(place.upper_dir / "a")
    assert upper.has_whiteout(upper.root, b"a")


@pytest.mark.parametrize("tree", [EMPTY, {"a": ""}, {"a/": None}, {".wh.a": ""}])
def test_other_objects_are_no_whiteout_device(place: Place, tree: Tree):
    make_tree(place.upper_dir, tree)
    upper = place.open()
    assert not upper.has_whiteout(upper.root, b"a")


def test_file_is_replaced_by_a_whiteout(place: Place, upper: Upper):
    make_tree(place.upper_dir, {"a": "text", "b": HardLink("a")})
    upper.replace_by_whiteout(upper.root, b"a")
    assert hides(place.upper_dir, "a")
    assert (place.upper_dir / "b").read_text() == "text"
    assert list(place.staging.iterdir()) == []


@pytest.mark.parametrize("inside", [{"d/": None}, {"d/gone": WHITEOUT, "d/.wh.x": ""}])
def test_directory_is_swapped_for_a_whiteout(place: Place, upper: Upper, inside: Tree):
    make_tree(place.upper_dir, inside)
    upper.swap_directory_for_whiteout(upper.root, b"d")
    assert hides(place.upper_dir, "d")
    assert list(place.staging.iterdir()) == []


@pytest.mark.parametrize("inside", [{"d/": None}, {"d/gone": WHITEOUT, "d/.wh.x": ""}])
def test_directory_of_whiteouts_is_removed(place: Place, inside: Tree):
    make_tree(place.upper_dir, inside)
    upper = place.open()
    upper.remove_directory(upper.root, b"d")
    assert list(place.upper_dir.iterdir()) == []
    assert list(place.staging.iterdir()) == []


@pytest.mark.usefixtures("strike")
def test_file_stays_when_its_whiteout_cannot_be_published(place: Place):
    make_tree(place.upper_dir, {"a": "text"})
    upper = place.open()
    faults.arm("unlink.whiteout-staged:EIO")
    with pytest.raises(OSError, match="injected"):
        upper.replace_by_whiteout(upper.root, b"a")
    assert (place.upper_dir / "a").read_text() == "text"
    assert list(place.staging.iterdir()) == []


@pytest.mark.usefixtures("strike")
def test_directory_stays_when_its_whiteout_cannot_be_published(place: Place):
    make_tree(place.upper_dir, {"d/gone": WHITEOUT})
    upper = place.open()
    faults.arm("rmdir.whiteout-staged:ENOSPC")
    with pytest.raises(OSError, match="injected"):
        upper.swap_directory_for_whiteout(upper.root, b"d")
    assert is_whiteout(place.upper_dir / "d/gone")
    assert list(place.staging.iterdir()) == []


def test_whiteout_file_is_put_twice_without_complaint(place: Place):
    upper = place.open()
    upper.put_aufs_whiteout(upper.root, b"a")
    upper.put_aufs_whiteout(upper.root, b"a")
    assert os.listdir(place.upper_dir) == [".wh.a"]


def test_whiteout_file_is_cleared_if_it_is_there(place: Place):
    upper = place.open()
    upper.put_aufs_whiteout(upper.root, b"a")
    upper.clear_aufs_whiteout(upper.root, b"a")
    upper.clear_aufs_whiteout(upper.root, b"a")
    assert list(place.upper_dir.iterdir()) == []


def test_whiteout_file_that_is_a_link_is_not_written_through(place: Place, scratch: Path):
    make_tree(place.upper_dir, {".wh.a": Symlink(str(scratch / "outside"))})
    upper = place.open()
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        upper.put_aufs_whiteout(upper.root, b"a")
    assert not (scratch / "outside").exists()


# --- markers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefer_user", [False, True])
def test_directory_is_made_opaque(place: Place, prefer_user: bool):
    make_tree(place.upper_dir, {"d/": None})
    upper = place.open(prefer_user_xattrs=prefer_user)
    sheet = sub(upper, b"d")
    upper.make_opaque(sheet.xattr_path(None), sheet.fd())
    name = ("user" if prefer_user else "trusted") + ".overlay.opaque"
    assert os.getxattr(place.upper_dir / "d", name) == b"y"
    assert sheet.marks().opaque


def test_redirect_is_noted_on_a_directory(place: Place):
    make_tree(place.upper_dir, {"d/": None})
    upper = place.open()
    upper.set_redirect(sub(upper, b"d").xattr_path(None), b"/old/place")
    hit = upper.root.examine(b"d", beneath=True)
    assert hit.redirect == (True, [b"old", b"place"])


def test_directory_is_made_impure_for_all_who_know_it(place: Place):
    make_tree(place.upper_dir, {"d/": None})
    upper = place.open()
    sheet = sub(upper, b"d")
    assert not sheet.marks().impure
    upper.make_impure(sheet)
    assert sheet.impure
    assert sub(upper, b"d").marks().impure


# --- origin and index --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree", [{"a": ""}, {"a/": None}, {"a": Symlink("x")}, {"a": Node(kind=stat.S_IFIFO)}]
)
def test_origin_is_read_as_written(place: Place, tree: Tree):
    make_tree(place.upper_dir, tree)
    upper = place.open()
    upper.write_origin(upper.root.xattr_path(b"a"), 12345)
    assert upper.read_origin(upper.root.xattr_path(b"a")) == 12345


def test_object_that_was_not_copied_up_has_no_origin(place: Place):
    make_tree(place.upper_dir, {"a": ""})
    upper = place.open()
    assert upper.read_origin(upper.root.xattr_path(b"a")) is None


def test_origin_that_cannot_be_kept_is_left_out(place: Place):
    make_tree(place.upper_dir, {"a": Symlink("x")})
    upper = place.open(prefer_user_xattrs=True)  # xattr(7): no user attributes on links
    upper.write_origin(upper.root.xattr_path(b"a"), 12345)
    assert upper.read_origin(upper.root.xattr_path(b"a")) is None


def test_standing_names_are_read_as_written(place: Place):
    make_tree(place.work_dir, {"links/00000000000000aa": ""})
    upper = place.open()
    upper.write_standing(upper.index_name(0xAA), 3)
    assert upper.read_standing(upper.index_name(0xAA)) == 3


def test_index_entry_goes_once(place: Place):
    make_tree(place.work_dir, {"links/00000000000000aa": ""})
    upper = place.open()
    upper.drop_index(upper.index_name(0xAA))
    upper.drop_index(upper.index_name(0xAA))
    assert (upper.indexed, list(place.links.iterdir())) == (set(), [])


def test_times_change_with_a_change_in_place_that_succeeds(place: Place):
    make_tree(place.work_dir, {"links/00000000000000aa": Node("old", mtime_ns=1111)})
    upper = place.open()
    with (
        open(place.links / "00000000000000aa", "r+b") as file,
        upper.times_noted(0xAA, file.fileno()),
    ):
        assert os.listdir(place.staging) == ["times-00000000000000aa"]
        os.utime(file.fileno(), ns=(3333, 3333))
    assert (place.links / "00000000000000aa").stat().st_mtime_ns == 3333
    assert list(place.staging.iterdir()) == []


def test_times_come_back_after_a_change_in_place_that_fails(place: Place):
    make_tree(place.work_dir, {"links/00000000000000aa": Node("old", mtime_ns=1111)})
    upper = place.open()

    def fail(fd: int) -> None:
        with upper.times_noted(0xAA, fd):
            os.write(fd, b"new")
            raise RuntimeError

    with open(place.links / "00000000000000aa", "r+b") as file:
        with pytest.raises(RuntimeError):
            fail(file.fileno())
        assert os.fstat(file.fileno()).st_mtime_ns == 1111
    assert list(place.staging.iterdir()) == []


def test_closing_leaves_no_descriptor(scratch: Path):
    before = len(os.listdir("/proc/self/fd"))
    place = Place(scratch)
    make_tree(place.upper_dir, {"d/e/": None})
    upper = place.open()
    sub(upper, b"d").child(b"e").fd()
    place.close()
    assert len(os.listdir("/proc/self/fd")) == before
