"""The mount program as others call it: exit status, descriptors, messages, spellings, signals."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.mounts import mount_points
from tests.support.stack import Stacks
from tests.support.trees import make_tree
from tests.support.users import errno_of
from unionfs import client
from unionfs.options import escape_path

pytestmark = [pytest.mark.root, pytest.mark.fuse]

PROJECT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(PROJECT)}
EXIT_TIMEOUT_S = 20.0


@pytest.fixture
def place(scratch: Path) -> Path:
    """A folder with l, l2, u, w and m, and a file in each lower."""
    for name in ("l", "l2", "u", "w", "m"):
        (scratch / name).mkdir()
    make_tree(scratch / "l", {"file": "lower"})
    make_tree(scratch / "l2", {"second": "lower2", "file": "hidden"})
    return scratch


def run(*words: str | bytes | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the mount program to its end; its output goes through pipes, read until they close."""
    command = [sys.executable, "-m", "unionfs", *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=ENV, cwd=cwd, timeout=60
    )


def is_mounted(path: Path) -> bool:
    return any(mount.path == path for mount in mount_points())


def servers(place: Path) -> list[int]:
    """The processes whose command line names the folder."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(place) + b"/" in cmdline.read_bytes():
                found.append(int(cmdline.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_gone(place: Path) -> None:
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while servers(place):
        assert time.monotonic() < deadline, "the server still runs"
        time.sleep(0.02)


def unmount(place: Path, name: str = "m") -> None:
    subprocess.run(["umount", place / name], check=True)
    wait_gone(place)


def stack_option(place: Path) -> str:
    return f"lowerdir={place}/l,upperdir={place}/u,workdir={place}/w"


# --- start and end -------------------------------------------------------------------------------


def test_exit_0_means_that_it_serves_and_holds_no_pipe_of_the_caller(place: Path) -> None:
    # `run` returns only when both pipes are closed by everybody.
    done = run("-o", stack_option(place), place / "m")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (place / "m/file").read_text() == "lower"
    unmount(place)


def test_server_holds_no_descriptor_and_no_folder_of_the_caller(place: Path) -> None:
    kept = os.open(place / "l2", os.O_RDONLY)
    os.set_inheritable(kept, True)
    command = [sys.executable, "-m", "unionfs", "-o", stack_option(place), str(place / "m")]
    subprocess.run(command, check=True, env=ENV, cwd=place / "l2", close_fds=False, timeout=60)
    os.close(kept)
    [pid] = servers(place)
    held = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    assert not [target for target in held if "/l2" in target]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    unmount(place)


def test_sigterm_unmounts_and_ends_with_status_0(stack: Stacks) -> None:
    s = stack({"file": "x"})
    (s.merged / "file").write_text("kept")
    assert s.mount is not None
    os.kill(s.mount.pid, signal.SIGTERM)
    assert s.mount.wait_exit(EXIT_TIMEOUT_S) == 0
    assert not is_mounted(s.merged)
    s.mount = None
    assert (s.upper / "file").read_text() == "kept"
    s.start()
    assert (s.merged / "file").read_text() == "kept"


def test_sigterm_lets_the_last_user_finish(stack: Stacks) -> None:
    s = stack({"file": "x"})
    fd = os.open(s.merged / "file", os.O_RDWR)
    assert s.mount is not None
    os.kill(s.mount.pid, signal.SIGTERM)
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while is_mounted(s.merged):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert os.write(fd, b"late") == 4
    os.close(fd)
    assert s.mount.wait_exit(EXIT_TIMEOUT_S) == 0
    s.mount = None
    assert (s.upper / "file").read_bytes() == b"late"


def test_version_is_told_without_loading_the_server() -> None:
    code = (
        "import sys; from unionfs.__main__ import main; status = main(['--version']);"
        "sys.exit(status or 3 * bool({'trio', 'pyfuse3'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 0
    assert done.stdout.startswith("mica-fuse")


def test_help_lists_the_options() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "lowerdir=" in done.stdout


def test_unknown_option_is_reported_and_ignored(place: Path) -> None:
    done = run("-o", stack_option(place) + ",frobnicate=1", place / "m")
    assert done.returncode == 0
    assert done.stderr == "unknown argument ignored: frobnicate=1\n"
    unmount(place)


# --- what is refused -----------------------------------------------------------------------------


def assert_refused(place: Path, done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode != 0
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("mica-fuse: ")
    assert all(word in line for word in said), line
    assert not is_mounted(place / "m")
    assert servers(place) == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("lowerdir={0}/missing", "missing does not exist"),
        ("lowerdir={0}/l:{0}/missing", "missing does not exist"),
        ("lowerdir={0}/l/file", "is not a directory"),
        ("lowerdir={0}/l,upperdir={0}/missing,workdir={0}/w", "missing does not exist"),
        ("lowerdir={0}/l,upperdir={0}/u,workdir={0}/missing", "missing does not exist"),
        ("lowerdir={0}/l,upperdir={0}/u,workdir={0}/u", "lie inside one another"),
        ("lowerdir={0}/l,upperdir={0}/u,workdir={0}/u/..", "lie inside one another"),
        ("lowerdir={0}/l:{0}/u,upperdir={0}/u,workdir={0}/w", "both a lower and the upper"),
        ("upperdir={0}/u,workdir={0}/w", "lowerdir"),
        ("lowerdir={0}/l,upperdir={0}/u,workdir=/dev/shm", "different file systems"),
        ("lowerdir={0}/l,upperdir=/proc,workdir=/proc", ""),
        ("lowerdir={0}/l,timeout=soon", "timeout"),
        ("lowerdir={0}/l,uidmapping=1:2", "uidmapping"),
        ("lowerdir={0}/l,redirect_dir=maybe", "redirect_dir"),
        ("dirs={0}/l=rw:{0}/l2=rw", "both writable"),
    ],
)
def test_bad_stack_is_refused_in_one_line(place: Path, option: str, said: str) -> None:
    done = run("-o", option.format(place), place / "m")
    assert_refused(place, done, said)


def test_upper_on_a_read_only_file_system_is_refused(place: Path) -> None:
    subprocess.run(["mount", "--bind", place, place / "m"], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", place / "m"], check=True)
        option = f"lowerdir={place}/l,upperdir={place}/m/u,workdir={place}/m/w"
        done = run("-o", option, place / "l2")
    finally:
        subprocess.run(["umount", place / "m"], check=True)
    assert not is_mounted(place / "l2")
    assert_refused(place, done, "ead-only")


def test_missing_mount_point_is_refused(place: Path) -> None:
    assert_refused(place, run("-o", stack_option(place), place / "missing"), "missing")


def test_mount_point_that_is_a_file_is_refused(place: Path) -> None:
    assert_refused(place, run("-o", stack_option(place), place / "l/file"), "not a directory")


@pytest.mark.parametrize("busy", ["u", "w"])
def test_busy_upper_or_work_directory_is_refused(place: Path, busy: str) -> None:
    for name in ("u2", "w2", "m2"):
        (place / name).mkdir()
    assert run("-o", stack_option(place), place / "m").returncode == 0
    upper, work = ("u", "w2") if busy == "u" else ("u2", "w")
    option = f"lowerdir={place}/l,upperdir={place}/{upper},workdir={place}/{work}"
    done = run("-o", option, place / "m2")
    assert done.returncode != 0
    [line] = done.stderr.splitlines()
    assert f"{place}/{busy}" in line
    assert not is_mounted(place / "m2")
    assert (place / "m/file").read_text() == "lower"
    unmount(place)


def test_without_a_mount_point_it_is_a_usage_error(place: Path) -> None:
    assert run("-o", stack_option(place)).returncode == 2


# --- spellings -----------------------------------------------------------------------------------

HELPER = """
set -e
mount -t tmpfs tmpfs /usr/local/sbin
printf '#!/bin/sh\\nPYTHONPATH=%s exec %s -m unionfs "$@"\\n' "$1" "$2" > /usr/local/sbin/mica-fuse
chmod 755 /usr/local/sbin/mica-fuse
export PATH=/usr/local/sbin:$PATH
mount -t fuse.mica-fuse "$3" "$4" -o "$5"
grep " $4 " /proc/mounts
cat "$4/file"
mount -o remount,ro "$4"
grep -c " $4 fuse.mica-fuse ro," /proc/mounts
umount "$4"
"""


def test_mount_8_finds_the_helper_and_shows_the_source(place: Path) -> None:
    script = ["unshare", "--mount", "sh", "-c", HELPER, "sh", PROJECT, sys.executable]
    words = [*script, "the-source", place / "m", stack_option(place)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    mounted, content, *_ = done.stdout.splitlines()
    assert mounted.startswith(f"the-source {place}/m fuse.mica-fuse rw,")
    assert content == "lower1"  # the file has no newline; 1 is the count of read-only mounts
    wait_gone(place)


def test_fsname_is_shown_as_source(place: Path) -> None:
    assert run("-o", stack_option(place) + ",fsname=named", place / "m").returncode == 0
    [mounted] = [mount for mount in mount_points() if mount.path == place / "m"]
    assert (mounted.source, mounted.fs_type) == ("named", "fuse.mica-fuse")
    unmount(place)


@pytest.mark.parametrize(
    "spelling", ["dirs={0}/u=rw:{0}/l=ro", "br:{0}/u=rw;{0}/l=ro", "br={0}/u:{0}/l"]
)
def test_aufs_spelling_stacks_the_same(place: Path, spelling: str) -> None:
    done = run("-o", spelling.format(place), "none", place / "m")
    assert (done.returncode, done.stderr) == (0, "")
    (place / "m/file").write_text("changed")
    (place / "m/new").write_text("made")
    assert (place / "l/file").read_text() == "lower"
    assert (place / "u/file").read_text() == "changed"
    unmount(place)
    assert sorted(os.listdir(place / "u")) == ["file", "new"]


def test_read_only_stack_needs_no_upper(place: Path) -> None:
    assert run("-o", f"lowerdir={place}/l:{place}/l2", place / "m").returncode == 0
    assert (place / "m/file").read_text() == "lower"
    assert (place / "m/second").read_text() == "lower2"
    assert errno_of((place / "m/new").touch) == errno.EROFS
    unmount(place)


def test_relative_paths_and_symlinks_name_layers(place: Path) -> None:
    (place / "s").symlink_to("l")
    option = "lowerdir=s:l2,upperdir=u,workdir=w"
    assert run("-o", option, "m", cwd=place).returncode == 0
    assert sorted(os.listdir(place / "m")) == ["file", "second"]
    assert is_mounted(place / "m")
    subprocess.run(["umount", place / "m"], check=True)


@pytest.mark.parametrize(
    "name", ["a:b", "a,b", "a\\b", "a b", 'a"b', "a=b;c", "-a", "a\nb", "\\040"]
)
def test_odd_characters_in_paths_are_escaped(place: Path, name: str) -> None:
    for kind in ("l", "u", "w", "m"):
        (place / kind).rename(place / f"{kind}{name}")
    lower, upper, work = (os.fsdecode(escape_path(bytes(place / (kind + name)))) for kind in "luw")
    done = run("-o", f"lowerdir={lower},upperdir={upper},workdir={work}", place / f"m{name}")
    assert (done.returncode, done.stderr) == (0, "")
    (place / f"m{name}/file").write_text("changed")
    assert (place / f"u{name}/file").read_text() == "changed"
    subprocess.run(["umount", place / f"m{name}"], check=True)


# --- the client ----------------------------------------------------------------------------------


def test_client_mounts_names_the_server_and_unmounts(place: Path) -> None:
    mount = client.mount(place / "m", lower=[place / "l"], upper=place / "u", work=place / "w")
    assert mount.mountpoint == bytes(place / "m")
    assert mount.is_serving()
    assert mount.pid in servers(place)
    (place / "m/file").write_text("new")
    mount.unmount()
    assert not mount.is_serving()
    assert mount.wait_exit(1.0) == 0
    assert not is_mounted(place / "m")


def test_client_raises_the_servers_one_line(place: Path) -> None:
    with pytest.raises(client.MountError, match=r"^lower directory .*/missing does not exist"):
        client.mount(place / "m", lower=[place / "missing"])
    assert not is_mounted(place / "m")
    assert servers(place) == []


def test_client_says_that_a_mount_is_busy_and_unmounts_lazily(place: Path) -> None:
    mount = client.mount(place / "m", lower=[place / "l"])
    fd = os.open(place / "m/file", os.O_RDONLY)
    with pytest.raises(client.MountError, match="busy"):
        mount.unmount()
    assert mount.is_serving()
    client.unmount_path(mount.mountpoint, lazy=True)
    assert not is_mounted(place / "m")
    assert os.pread(fd, 9, 0) == b"lower"
    os.close(fd)
    assert mount.wait_exit(EXIT_TIMEOUT_S) == 0


def test_client_kill_takes_the_dead_mount_away(place: Path) -> None:
    mount = client.mount(place / "m", lower=[place / "l"], upper=place / "u", work=place / "w")
    mount.kill()
    assert not is_mounted(place / "m")
    assert mount.wait_exit(1.0) == -signal.SIGKILL
    again = client.mount(place / "m", lower=[place / "l"], upper=place / "u", work=place / "w")
    again.unmount()


def test_client_options_and_environment_reach_the_server(place: Path) -> None:
    mount = client.mount(
        place / "m", lower=[place / "l"], options=["squash_to_uid=5"], env={"MICA_FAULT": ""}
    )
    assert (place / "m/file").stat().st_uid == 5
    environ = Path(f"/proc/{mount.pid}/environ").read_bytes().split(b"\0")
    assert b"MICA_FAULT=" in environ
    mount.unmount()
