"""What each mount option changes, seen from inside the mount and in the layers."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tests.support.stack import Stacks
from tests.support.trees import HardLink, Node
from tests.support.users import errno_of, run_as
from unionfs.client import MountError

ACCESS = "system.posix_acl_access"
MAPPED = ("uidmapping=0:100000:65536", "gidmapping=0:200000:65536")
OVERFLOW = 65534


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


# --- owners --------------------------------------------------------------------------------------


def test_mapping_shows_owners_of_layers_shifted(stack: Stacks) -> None:
    tree = {"root": "x", "user": Node("x", uid=1000, gid=100), "far": Node("x", uid=70_000)}
    s = stack(tree, options=MAPPED)
    assert owner(s.merged / "root") == (100_000, 200_000)
    assert owner(s.merged / "user") == (101_000, 200_100)
    assert owner(s.merged / "far") == (OVERFLOW, 200_000)


def test_mapping_stores_owners_of_new_objects_as_the_layers_do(stack: Stacks) -> None:
    s = stack({"dir/": Node(mode=0o777)}, options=MAPPED)
    run_as(101_000, (s.merged / "dir/file").touch, gid=200_100)
    run_as(101_000, (s.merged / "dir/sub").mkdir, gid=200_100)
    run_as(101_000, lambda: (s.merged / "dir/link").symlink_to("file"), gid=200_100)
    for name in ("file", "sub", "link"):
        assert owner(s.merged / "dir" / name) == (101_000, 200_100)
        assert owner(s.upper / "dir" / name) == (1000, 100)


def test_chown_in_mapping_stores_the_disk_owner(stack: Stacks) -> None:
    s = stack({"file": "x"}, options=MAPPED)
    os.chown(s.merged / "file", 100_007, 200_008)
    assert owner(s.merged / "file") == (100_007, 200_008)
    assert owner(s.upper / "file") == (7, 8)
    s.remount()
    assert owner(s.merged / "file") == (100_007, 200_008)


@pytest.mark.parametrize(("uid", "gid"), [(5, -1), (-1, 5), (100_000 + 65_536, -1)])
def test_chown_outside_the_mapping_is_refused(stack: Stacks, uid: int, gid: int) -> None:
    s = stack({"file": "x"}, options=MAPPED)
    assert errno_of(lambda: os.chown(s.merged / "file", uid, gid)) == errno.EINVAL
    assert owner(s.merged / "file") == (100_000, 200_000)


def test_copy_up_in_mapping_keeps_the_disk_owner(stack: Stacks) -> None:
    s = stack({"file": Node("x", uid=1000, gid=100)}, options=MAPPED)
    (s.merged / "file").write_text("changed")
    assert owner(s.upper / "file") == (1000, 100)


def test_mapping_of_several_ranges(stack: Stacks) -> None:
    tree = {"a": "x", "b": Node("x", uid=1)}
    s = stack(tree, options=["uidmapping=0:1000:1:1:100000:65536"])
    assert owner(s.merged / "a") == (1000, 0)
    assert owner(s.merged / "b") == (100_000, 0)


def acl_of_user(uid: int) -> bytes:
    entries = [(0x01, 6, -1), (0x02, 6, uid), (0x04, 4, -1), (0x10, 6, -1), (0x20, 4, -1)]
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, mode, number & 0xFFFFFFFF) for tag, mode, number in entries
    )


def test_ids_in_acls_are_mapped_both_ways(stack: Stacks) -> None:
    s = stack({"file": "x"}, options=MAPPED)
    os.setxattr(s.merged / "file", ACCESS, acl_of_user(100_042))
    assert os.getxattr(s.merged / "file", ACCESS) == acl_of_user(100_042)
    assert os.getxattr(s.upper / "file", ACCESS) == acl_of_user(42)


def test_acl_with_an_id_outside_the_mapping_is_refused(stack: Stacks) -> None:
    s = stack({"file": "x"}, options=MAPPED)
    failed = errno_of(lambda: os.setxattr(s.merged / "file", ACCESS, acl_of_user(42)))
    assert failed == errno.EINVAL


def test_squash_to_root_shows_root_and_stores_the_truth(stack: Stacks) -> None:
    s = stack({"file": Node("x", uid=1000, gid=100)}, options=["squash_to_root"])
    assert owner(s.merged / "file") == (0, 0)
    (s.merged / "file").write_text("changed")
    assert owner(s.merged / "file") == (0, 0)
    assert owner(s.upper / "file") == (1000, 100)


def test_squash_to_ids_shows_them_everywhere(stack: Stacks) -> None:
    s = stack({"file": "x", "d/": None}, options=["squash_to_uid=77,squash_to_gid=88"])
    (s.merged / "new").touch()
    for name in ("", "file", "d", "new"):
        assert owner(s.merged / name) == (77, 88)


# --- volatile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_well", [True, False], ids=["unmounted", "killed"])
def test_volatile_mount_leaves_a_mark_that_the_next_mount_obeys(
    stack: Stacks, ends_well: bool
) -> None:
    s = stack({"file": "x"}, options=["volatile"])
    (s.merged / "file").write_text("new")
    fd = os.open(s.merged / "file", os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    mark = s.work / "work/incompat/volatile"
    assert mark.is_dir()
    (s.unmount if ends_well else s.kill)()
    for options in ((), ("volatile",)):
        with pytest.raises(MountError, match="volatile"):
            s.start(options=options)
    mark.rmdir()  # what podman does before it mounts
    s.start(options=[])
    assert (s.merged / "file").read_text() == "new"
    s.unmount()
    assert not mark.exists()


@pytest.mark.parametrize("option", ["fsync=0", "sync=0"])
def test_fsync_may_be_turned_off(stack: Stacks, option: str) -> None:
    s = stack({"file": "x"}, options=[option])
    with open(s.merged / "file", "r+b") as file:
        file.write(b"new")
        file.flush()
        os.fsync(file)
    assert not (s.work / "work/incompat").exists()


# --- attributes ----------------------------------------------------------------------------------


def test_noacl_refuses_acls_and_keeps_other_attributes(stack: Stacks) -> None:
    s = stack({"file": Node("x", mode=0o640), "dir/": None}, options=["noacl"])
    for path, name in (("file", ACCESS), ("dir", ACCESS), ("dir", "system.posix_acl_default")):
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(s.merged / path, name, acl_of_user(7))
    os.setxattr(s.merged / "file", "user.a", b"1")
    assert os.listxattr(s.merged / "file") == ["user.a"]
    assert stat.S_IMODE((s.merged / "file").stat().st_mode) == 0o640


def test_noacl_hides_acls_of_layers_but_copies_them_up(stack: Stacks) -> None:
    s = stack({"file": Node("x", xattrs={ACCESS: acl_of_user(7)})}, options=["noacl"])
    assert os.listxattr(s.merged / "file") == []
    assert errno_of(lambda: os.getxattr(s.merged / "file", ACCESS)) == errno.EOPNOTSUPP
    (s.merged / "file").write_text("new")
    assert os.getxattr(s.upper / "file", ACCESS) == acl_of_user(7)


def test_noxattrs_refuses_all_attributes_but_copies_them_up(stack: Stacks) -> None:
    s = stack({"file": Node("x", xattrs={"user.a": b"1"})}, options=["noxattrs=1"])
    path = s.merged / "file"
    assert errno_of(lambda: os.getxattr(path, "user.a")) == errno.EOPNOTSUPP
    assert errno_of(lambda: os.setxattr(path, "user.b", b"1")) == errno.EOPNOTSUPP
    assert errno_of(lambda: os.listxattr(path)) in {0, errno.EOPNOTSUPP}
    path.write_text("new")
    assert os.getxattr(s.upper / "file", "user.a") == b"1"


@pytest.mark.parametrize("value", [1, 2])
def test_xattr_permissions_are_refused_in_one_line(stack: Stacks, value: int) -> None:
    s = stack({"file": "x"}, mounted=False)
    with pytest.raises(MountError, match=f"^xattr_permissions={value}: .*leave it out$"):
        s.start(options=[f"xattr_permissions={value}"])
    s.start(options=["xattr_permissions=0"])


def test_context_is_ignored_without_selinux(stack: Stacks) -> None:
    s = stack({"file": "x"}, options=['context="system_u:object_r:container_file_t:s0:c1,c2"'])
    assert (s.merged / "file").read_text() == "x"


# --- what the kernel may remember ----------------------------------------------------------------


def test_timeout_0_shows_changes_made_below_the_mount(stack: Stacks) -> None:
    s = stack({"file": "old", "gone": "x", "dir/a": "1"}, options=["timeout=0"])
    assert (s.merged / "file").read_text() == "old"
    assert not (s.merged / "new").exists()
    assert sorted(os.listdir(s.merged)) == ["dir", "file", "gone"]
    assert os.listdir(s.merged / "dir") == ["a"]
    (s.lower / "file").write_text("newer")
    (s.lower / "gone").unlink()
    (s.lower / "new").write_text("made below")
    (s.upper / "upper").write_text("made in the upper")
    (s.lower / "dir/b").write_text("2")
    (s.lower / "dir/a").unlink()
    assert (s.merged / "file").read_text() == "newer"
    assert (s.merged / "file").stat().st_size == 5
    assert not (s.merged / "gone").exists()
    assert (s.merged / "new").read_text() == "made below"
    assert (s.merged / "upper").read_text() == "made in the upper"
    assert sorted(os.listdir(s.merged)) == ["dir", "file", "new", "upper"]
    assert os.listdir(s.merged / "dir") == ["b"]


def test_timeout_0_serves_all_ordinary_calls(stack: Stacks) -> None:
    s = stack({"file": "x", "dir/sub/leaf": "y", "link": HardLink("file")}, options=["timeout=0"])
    (s.merged / "file").write_text("new")
    (s.merged / "dir").rename(s.merged / "moved")
    (s.merged / "moved/sub/leaf").unlink()
    (s.merged / "moved/sub").rmdir()
    (s.merged / "moved/new").mkdir()
    assert (s.merged / "link").read_text() == "new"
    assert os.listdir(s.merged / "moved") == ["new"]
    s.remount()
    assert os.listdir(s.merged / "moved") == ["new"]


# --- read-only, numbers, links -------------------------------------------------------------------


def test_ro_reads_the_upper_and_changes_nothing(stack: Stacks) -> None:
    s = stack({"file": "lower", "other": "x"}, upper={"file": "upper"}, options=["ro"])
    assert (s.merged / "file").read_text() == "upper"
    for change in (
        (s.merged / "new").touch,
        lambda: (s.merged / "other").write_text("y"),
        lambda: (s.merged / "other").chmod(0o600),
        (s.merged / "other").unlink,
        lambda: os.setxattr(s.merged / "other", "user.a", b"1"),
    ):
        assert errno_of(change) == errno.EROFS
    assert os.listdir(s.upper) == ["file"]
    s.remount(options=["rw"])
    (s.merged / "new").touch()


def test_static_nlink_shows_1_for_directories_alone(stack: Stacks) -> None:
    tree = {"dir/a/": None, "dir/b/": None, "file": "x", "link": HardLink("file")}
    s = stack(tree, options=["static_nlink"])
    assert (s.merged / "dir").stat().st_nlink == 1
    assert s.merged.stat().st_nlink == 1
    assert (s.merged / "file").stat().st_nlink == 2


def test_directory_nlink_counts_subdirectories_by_default(stack: Stacks) -> None:
    s = stack([{"dir/a/": None, "dir/x": "1"}, {"dir/b/": None, "dir/a/": None}])
    assert (s.merged / "dir").stat().st_nlink == 4
    (s.merged / "dir/c").mkdir()
    (s.merged / "dir/b").rmdir()
    assert (s.merged / "dir").stat().st_nlink == 4


def test_ino32_keeps_numbers_within_32_bits_apart_and_stable(stack: Stacks, scratch: Path) -> None:
    s = stack({f"d/{number}": f"{number}" for number in range(50)}, mounted=False)
    other = scratch / "memory"
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", other], check=True)
    try:
        (other / "d").mkdir()
        for number in range(50, 100):
            (other / f"d/{number}").write_text(f"{number}")
        os.link(other / "d/50", other / "d/linked")
        s.lowers.append(other)
        s.start(options=["ino32_t"])
        paths = [s.merged, s.merged / "d", *(s.merged / f"d/{number}" for number in range(100))]
        numbers = [path.stat().st_ino for path in paths]
        assert max(numbers) < 1 << 32
        assert len(set(numbers)) == len(numbers)
        (s.merged / "d/50").write_text("copied up")
        assert (s.merged / "d/linked").read_text() == "copied up"
        with os.scandir(s.merged / "d") as listing:
            assert all(entry.inode() == entry.stat().st_ino for entry in listing)
        assert [path.stat().st_ino for path in paths] == numbers
        s.remount(options=[])
        assert (s.merged / "d/linked").read_text() == "copied up"
        assert (s.merged / "d/50").stat().st_nlink == 2
        s.unmount()
    finally:
        subprocess.run(["umount", other], check=True)
        s.lowers.pop()


def test_max_write_limits_a_request(stack: Stacks) -> None:
    s = stack({}, options=["max_write=8192", "debug"])
    (s.merged / "file").write_bytes(b"x" * 100_000)
    assert (s.upper / "file").read_bytes() == b"x" * 100_000
    assert s.mount is not None
    os.kill(s.mount.pid, 10)  # SIGUSR1: the request counts go to the log
    (s.merged / "file").stat()
    s.unmount()
    counts = s.log()
    assert "'write': 13" in counts  # ceil(100000 / 8192)


# --- data-only layers ----------------------------------------------------------------------------


def make_metacopy(path: Path, size: int, redirect: str) -> None:
    """A file without data whose data is under `redirect` in a layer further down."""
    path.touch()
    os.truncate(path, size)
    os.setxattr(path, "trusted.overlay.metacopy", b"")
    os.setxattr(path, "trusted.overlay.redirect", os.fsencode(redirect))


def test_data_only_layer_gives_data_but_shows_no_names(stack: Stacks, scratch: Path) -> None:
    s = stack({"plain": "x"}, mounted=False)
    data = scratch / "data"
    (data / "ab").mkdir(parents=True)
    (data / "ab/blob").write_text("the data")
    (data / "alone").write_text("never shown")
    make_metacopy(s.lower / "file", 8, "/ab/blob")
    (s.lower / "file").chmod(0o640)
    options = f"lowerdir={s.lower}::{data}"
    s.start(options=[options])
    assert (s.merged / "file").read_text() == "the data"
    assert stat.S_IMODE((s.merged / "file").stat().st_mode) == 0o640
    assert sorted(os.listdir(s.merged)) == ["file", "plain"]
    assert not (s.merged / "alone").exists()
    with open(s.merged / "file", "a") as file:
        file.write(" and more")
    assert (s.upper / "file").read_text() == "the data and more"
    s.remount(options=[options])
    assert (s.merged / "file").read_text() == "the data and more"


def test_metacopy_without_data_is_an_error_for_that_file_alone(stack: Stacks) -> None:
    s = stack([{"plain": "x"}, {"other": "y"}], mounted=False)
    make_metacopy(s.lower / "file", 8, "/missing")
    s.start()
    s.allow_in_log("metadata without data")
    assert errno_of((s.merged / "file").read_text) == errno.EIO
    assert (s.merged / "plain").read_text() == "x"
