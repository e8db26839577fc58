"""The mount program's command line, as tables: what callers write, and what it means."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs import options
from unionfs.options import (
    Check,
    Help,
    IdMapping,
    IdRange,
    Mount,
    MountOptions,
    Remount,
    UsageError,
    Version,
    escape_path,
    libfuse_options,
    parse,
)

BASE = b"lowerdir=/l,upperdir=/u,workdir=/w"


def mount(text: bytes, *more: bytes) -> MountOptions:
    """The options of `-o text /m`."""
    command = parse([b"-o", text, *more, b"/m"])
    assert isinstance(command, Mount)
    return command.options


def with_base(text: bytes) -> MountOptions:
    return mount(BASE + b"," + text)


def refusal(*argv: bytes) -> str:
    with pytest.raises(UsageError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults():
    assert mount(BASE) == MountOptions(mountpoint=b"/m", lowers=(b"/l",), upper=b"/u", work=b"/w")
    plain = mount(BASE)
    assert plain.fsync
    assert plain.acl
    assert plain.xattrs
    assert plain.redirect_dir
    assert plain.metacopy
    assert plain.xino
    assert plain.timeout_s is None
    assert plain.userxattr is None
    assert plain.xattr_permissions == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([b"-o", BASE, b"/m"], (b"/m", None)),
        ([b"-o" + BASE, b"/m"], (b"/m", None)),
        ([b"/m", b"-o", BASE], (b"/m", None)),
        ([b"src", b"/m", b"-o", BASE], (b"/m", b"src")),
        ([b"src", b"-o", BASE, b"/m"], (b"/m", b"src")),
        ([b"", b"/m", b"-o", BASE], (b"/m", None)),
        ([b"-o", b"lowerdir=/l", b"-oupperdir=/u", b"-o", b"workdir=/w", b"m"], (b"m", None)),
        ([b"-o", BASE, b"--", b"-odd", b"-m"], (b"-m", b"-odd")),
        ([b"-o", BASE, b"-", b"/m"], (b"/m", b"-")),
        ([b"src", b"/m", b"-n", b"-s", b"-v", b"-t", b"fuse.x", b"-o", BASE], (b"/m", b"src")),
    ],
)
def test_where_arguments_may_stand(argv: list[bytes], expected: tuple[bytes, bytes | None]):
    command = parse(argv)
    assert isinstance(command, Mount)
    found = command.options
    assert (found.mountpoint, found.source) == expected
    assert (found.lowers, found.upper, found.work) == ((b"/l",), b"/u", b"/w")
    assert found.ignored == ()


@pytest.mark.parametrize("switch", [b"-h", b"--help"])
def test_help(switch: bytes):
    assert parse([switch]) == Help()
    assert parse([b"-o", BASE, switch, b"/m"]) == Help()


@pytest.mark.parametrize("switch", [b"-V", b"--version"])
def test_version(switch: bytes):
    assert parse([switch]) == Version()
    assert parse([b"-f", switch]) == Version()


@pytest.mark.parametrize(
    ("argv", "foreground", "debug"),
    [
        ([], False, False),
        ([b"-f"], True, False),
        ([b"-d"], True, True),
        ([b"--debug"], True, True),
        ([b"-o", b"debug"], True, True),
    ],
)
def test_foreground_and_debug(argv: list[bytes], foreground: bool, debug: bool):
    found = mount(BASE, *argv)
    assert (found.foreground, found.debug) == (foreground, debug)


@pytest.mark.parametrize(
    ("raw", "lowers", "data"),
    [
        (b"/a", [b"/a"], []),
        (b"/a:/b:/c", [b"/a", b"/b", b"/c"], []),
        (b"a:../b:l/XYZ", [b"a", b"../b", b"l/XYZ"], []),
        (b":/a:/b:", [b"/a", b"/b"], []),
        (b"/a\\:b:/c", [b"/a:b", b"/c"], []),
        (b"/a\\,b:/c", [b"/a,b", b"/c"], []),
        (b"/a\\\\:/b", [b"/a\\", b"/b"], []),
        (b"/a\\\\\\:/b", [b"/a\\:/b"], []),
        (b"/a\\040b\\072c", [b"/a b:c"], []),
        (b"/a\\777b", [b"/a777b"], []),
        (b'"/a,b":"/c,d"', [b"/a,b", b"/c,d"], []),
        (b'"/a:/b"', [b"/a", b"/b"], []),
        (b'/a"b:/c', [b'/a"b', b"/c"], []),
        (b'\\"/a"b', [b'"/a"b'], []),
        (b"/a;b=c", [b"/a;b=c"], []),
        (b"/\xff\xfe\n:/\xc3\xa4", [b"/\xff\xfe\n", b"/\xc3\xa4"], []),
        (b"/a::/d", [b"/a"], [b"/d"]),
        (b"/a:/b::/d1::/d2", [b"/a", b"/b"], [b"/d1", b"/d2"]),
        (b"/a\\:::/d", [b"/a:"], [b"/d"]),
    ],
)
def test_lowerdir(raw: bytes, lowers: list[bytes], data: list[bytes]):
    found = mount(b"lowerdir=" + raw + b",upperdir=/u,workdir=/w")
    assert found.lowers == tuple(lowers)
    assert found.data_lowers == tuple(data)
    assert found.upper == b"/u"


@pytest.mark.parametrize(
    "raw",
    [b"", b":", b"::", b"::/d", b"/a::", b"/a:::/b", b"/a::/d:/b:/c", b"/a::/d::", b"/a\\000"],
)
def test_lowerdir_with_a_directory_missing(raw: bytes):
    message = refusal(b"-o", b"lowerdir=" + raw, b"/m")
    assert message.startswith("lowerdir=")


def test_a_backslash_at_the_very_end_is_one():
    assert mount(b"lowerdir=/a\\").lowers == (b"/a\\",)


def test_lowerdir_of_a_plugin_is_refused():
    message = refusal(b"-o", b"lowerdir=//bolt/data/path", b"/m")
    assert "plugin" in message
    assert "//bolt/data/path" in message


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/u", b"/u"),
        (b"u", b"u"),
        (b"/a:b", b"/a:b"),
        (b"/a\\:b", b"/a:b"),
        (b"/a\\,b", b"/a,b"),
        (b"/a\\\\b", b"/a\\b"),
        (b'"/a,b"', b"/a,b"),
        (b"//u", b"//u"),
    ],
)
def test_upperdir_and_workdir_are_single_paths(raw: bytes, path: bytes):
    found = mount(b"lowerdir=/l,upperdir=" + raw + b",workdir=" + raw + b",ro")
    assert (found.upper, found.work, found.read_only) == (path, path, True)


def test_five_hundred_layers_in_one_argument():
    paths = [b"/var/lib/layers/%064d/diff" % number for number in range(500)]
    assert mount(b"lowerdir=" + b":".join(paths)).lowers == tuple(paths)


def test_upper_without_work_leaves_the_choice_to_the_session():
    found = mount(b"lowerdir=/l,upperdir=/u")
    assert (found.upper, found.work) == (b"/u", None)


def test_work_without_upper_is_of_no_use():
    found = mount(b"lowerdir=/l,workdir=/w")
    assert (found.upper, found.work) == (None, None)


def test_the_last_word_wins():
    found = mount(b"lowerdir=/x,lowerdir=/l,timeout=1,timeout=2,nosuid,suid", b"-o", b"timeout=3")
    assert found.lowers == (b"/l",)
    assert found.timeout_s == 3
    assert found.kernel_options == ("suid",)


@pytest.mark.parametrize(
    ("text", "upper", "lowers"),
    [
        (b"dirs=/tmp/a=rw:/tmp/b=ro", b"/tmp/a", [b"/tmp/b"]),
        (b'dirs="/tmp/a=rw:/tmp/b=ro"', b"/tmp/a", [b"/tmp/b"]),
        (b"dirs=/tmp/a=rw;/tmp/b=ro", b"/tmp/a", [b"/tmp/b"]),
        (b"br:/a=rw:/b=ro:/c=rr", b"/a", [b"/b", b"/c"]),
        (b"br=/a=rw:/b=ro", b"/a", [b"/b"]),
        (b'br:"/a,1=rw":/b=ro', b"/a,1", [b"/b"]),
        (b"dirs=/a:/b:/c", b"/a", [b"/b", b"/c"]),
        (b"dirs=/a=RW:/b=RO", b"/a", [b"/b"]),
        (b"dirs=/a=ro:/b=ro", None, [b"/a", b"/b"]),
        (b"dirs=/a=rr", None, [b"/a"]),
        (b"dirs=/a=rw+nolwh:/b=ro+wh:/c=rr+wh+coo_reg", b"/a", [b"/b", b"/c"]),
        (b"dirs=/a=b=rw:/c=d/e=ro", b"/a=b", [b"/c=d/e"]),
        (b"dirs=/a=1/x:/b=1/y", b"/a=1/x", [b"/b=1/y"]),
        (b"dirs=/a\\=rw=ro:/b", None, [b"/a=rw", b"/b"]),
        (b"dirs=/a\\:b=rw:/c\\;d=ro", b"/a:b", [b"/c;d"]),
        (b"dirs=/a=rw:/b=ro:", b"/a", [b"/b"]),
    ],
)
def test_aufs_spelling(text: bytes, upper: bytes | None, lowers: list[bytes]):
    found = mount(text + b",noacl")
    assert (found.upper, found.lowers, found.work) == (upper, tuple(lowers), None)
    assert not found.acl
    assert found.ignored == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"dirs=/a=rw:/b=rw", ["/a and /b are both writable", "/b=ro"]),
        (b"dirs=/a=ro:/b=rw", ["/b=rw stands below", "first"]),
        (b"dirs=/a=rw", ["no read-only directory"]),
        (b"dirs=", ["no read-only directory"]),
        (b"dirs=/a=rx:/b=ro", ["'rx'", "rw, ro or rr"]),
        (b"dirs=/a=rw+what:/b=ro", ["'rw+what'"]),
        (b"dirs==rw:/b=ro", ["names no directory"]),
        (b"dirs=/a=rw:/b=ro,lowerdir=/c", ["lowerdir= and dirs="]),
        (b"dirs=/a=rw:/b=ro,br:/a=rw:/b", ["dirs= and br="]),
    ],
)
def test_aufs_spelling_refused(text: bytes, says: list[str]):
    message = refusal(b"-o", text, b"/m")
    for words in says:
        assert words in message


def test_aufs_spelling_takes_the_place_of_its_own_xino_and_work():
    found = mount(b"br:/a=rw:/b=ro,xino=/tmp/table,workdir=/w")
    assert found.xino
    assert found.work == b"/w"


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        (b"squash_to_root", "squash_to_root", True),
        (b"squash_to_uid=0", "squash_to_uid", 0),
        (b"squash_to_uid=1000", "squash_to_uid", 1000),
        (b"squash_to_gid=4294967294", "squash_to_gid", 4294967294),
        (b"noacl", "acl", False),
        (b"noxattrs", "xattrs", False),
        (b"noxattrs=1", "xattrs", False),
        (b"noxattrs=0", "xattrs", True),
        (b"noxattrs,noxattrs=0", "xattrs", True),
        (b"noxattrs=0,noxattrs", "xattrs", False),
        (b"xattr_permissions=0", "xattr_permissions", 0),
        (b"xattr_permissions=1", "xattr_permissions", 1),
        (b"xattr_permissions=2", "xattr_permissions", 2),
        (b"redirect_dir=on", "redirect_dir", True),
        (b"redirect_dir=off", "redirect_dir", False),
        (b"redirect_dir=follow", "redirect_dir", False),
        (b"redirect_dir=nofollow", "redirect_dir", False),
        (b"metacopy=on", "metacopy", True),
        (b"metacopy=off", "metacopy", False),
        (b"userxattr", "userxattr", True),
        (b"xino=off", "xino", False),
        (b"xino=on", "xino", True),
        (b"xino=auto", "xino", True),
        (b"ino32_t", "ino32", True),
        (b"static_nlink", "static_nlink", True),
        (b"fsync=0", "fsync", False),
        (b"fsync=1", "fsync", True),
        (b"sync=0", "fsync", False),
        (b"volatile", "fsync", False),
        (b"volatile,fsync=1", "fsync", False),
        (b"volatile", "volatile", True),
        (b"fsync=0", "volatile", False),
        (b"max_write=4096", "max_write", 4096),
        (b"max_write=131072", "max_write", 131072),
        (b"fsname=overlay", "fsname", b"overlay"),
        (b"fsname=a\\,b", "fsname", b"a,b"),
        (b"fsname=", "fsname", None),
        (b"subtype=x", "subtype", b"x"),
        (b"ro", "read_only", True),
        (b"ro,rw", "read_only", False),
        (b"rw,ro", "read_only", True),
        (b"timeout=0", "timeout_s", 0.0),
        (b"timeout=1.5", "timeout_s", 1.5),
        (b"timeout=.5", "timeout_s", 0.5),
        (b"timeout=1e9", "timeout_s", 1e9),
        (b"timeout=1000000000.0", "timeout_s", 1e9),
        (b"timeout=inf", "timeout_s", None),
        (b"timeout=1e999", "timeout_s", None),
        (
            b'context="system_u:object_r:container_file_t:s0:c1,c2"',
            "context",
            b"system_u:object_r:container_file_t:s0:c1,c2",
        ),
        (b"context=a:b:c:s0\\,c9", "context", b"a:b:c:s0,c9"),
    ],
)
def test_one_option(text: bytes, field: str, value: object):
    found = with_base(text)
    assert getattr(found, field) == value
    assert found.ignored == ()


def test_an_option_changes_nothing_else():
    changed = with_base(b"static_nlink")
    assert dataclasses.replace(changed, static_nlink=False) == mount(BASE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"timeout=abc", "timeout=abc: not a number of seconds"),
        (b"timeout=", "timeout=: not a number of seconds"),
        (b"timeout=-1", "timeout=-1: not a number of seconds"),
        (b"timeout=nan", "timeout=nan: not a number of seconds"),
        (b"timeout=1_0", "timeout=1_0: not a number of seconds"),
        (b"squash_to_uid=root", "squash_to_uid=root: not a whole number from 0 to 4294967294"),
        (b"squash_to_uid=-1", "squash_to_uid=-1: not a whole number"),
        (b"squash_to_gid=4294967295", "squash_to_gid=4294967295: not a whole number"),
        (b"squash_to_gid=", "squash_to_gid=: not a whole number"),
        (b"max_write=1M", "max_write=1M: not a whole number from 4096"),
        (b"max_write=4095", "max_write=4095: not a whole number from 4096"),
        (b"xattr_permissions=3", "xattr_permissions=3: not a whole number from 0 to 2"),
        (b"redirect_dir=yes", "redirect_dir=yes: no such choice; use one of on, off, follow"),
        (b"metacopy=1", "metacopy=1: no such choice; use one of on, off"),
        (b"xino=maybe", "xino=maybe: no such choice"),
        (b"fsync=yes", "fsync=yes: not a yes or no"),
        (b"sync=no", "fsync=no: not a yes or no"),
        (b"noxattrs=", "noxattrs=: not a yes or no"),
        (b"upperdir=", "upperdir=: this names no directory"),
        (b"workdir=", "workdir=: this names no directory"),
        (b'context="a,b', "the quotation mark in context=a\\,b is not closed"),
    ],
)
def test_one_option_refused(text: bytes, says: str):
    assert refusal(b"-o", BASE + b"," + text, b"/m").startswith(says)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no mountpoint"),
        ([b"-o", BASE], "no mountpoint"),
        ([b"-o", BASE, b""], "no mountpoint"),
        ([b"/m"], "no lowerdir specified"),
        ([b"-o", b"upperdir=/u,workdir=/w", b"/m"], "no lowerdir specified"),
        ([b"/m", b"-o"], "-o must be followed by a value"),
        ([b"/m", b"-t"], "-t must be followed by a value"),
        ([b"-o", BASE, b"a", b"b", b"/m"], "too many arguments: a b /m"),
        ([b"--check"], "--check wants one directory"),
        ([b"--check="], "--check wants one directory"),
        ([b"--check", b"/u", b"/v"], "--check wants one directory"),
        ([b"-o", b"remount,ro"], "no mountpoint"),
    ],
)
def test_arguments_refused(argv: list[bytes], says: str):
    assert says in refusal(*argv)


def test_a_refusal_is_short_even_when_the_option_is_long():
    assert len(refusal(b"-o", b"lowerdir=:" + b":/x" * 5000 + b"::", b"/m")) < 500


@pytest.mark.parametrize(
    ("text", "ignored"),
    [
        (b"private", ["private"]),
        (b"verity=require", ["verity=require"]),
        (b"lowerdirs=/x", ["lowerdirs=/x"]),
        (b"timeout", ["timeout"]),
        (b"static_nlink=1", ["static_nlink=1"]),
        (b"a,b=c,,d", ["a", "b=c", "d"]),
        (b"Ro", ["Ro"]),
    ],
)
def test_what_nobody_knows_is_reported(text: bytes, ignored: list[str]):
    assert with_base(text).ignored == tuple(ignored)


def test_unknown_switches_are_reported():
    assert mount(BASE, b"-x", b"--what=1").ignored == ("-x", "--what=1")


@pytest.mark.parametrize(
    "text",
    [
        b"threaded=0",
        b"threaded=1",
        b"writeback=1",
        b"fast_ino=1",
        b"fast_ino_check=1",
        b"plugins=/a:/b",
        b"index=on",
        b"nfs_export=off",
        b"splice_read,splice_write,splice_move",
        b"kernel_cache",
        b"lazytime,relatime",
        b"defaults,noauto,nofail,_netdev,user",
        b"x-systemd.automount,X-mount.mkdir,x-gvfs-name=a",
        b"user_id=0,group_id=0",
    ],
)
def test_words_without_effect_pass_silently(text: bytes):
    assert with_base(text) == mount(BASE)


@pytest.mark.parametrize(
    ("text", "kernel_options"),
    [
        (b"rw", ["rw"]),
        (b"rw,nosuid,nodev,noexec", ["rw", "nosuid", "nodev", "noexec"]),
        (b"suid,dev,exec", ["suid", "dev", "exec"]),
        (b"suid,nosuid", ["nosuid"]),
        (b"nodev,dev", ["dev"]),
        (b"noexec,exec,noexec", ["noexec"]),
        (b"noatime,atime", ["atime"]),
        (b"nodiratime", ["nodiratime"]),
        (b"allow_other,allow_root", ["allow_root"]),
        (b"default_permissions", ["default_permissions"]),
        (b"sync", ["sync"]),
        (b"sync,async,dirsync", ["async", "dirsync"]),
    ],
)
def test_kernel_options(text: bytes, kernel_options: list[str]):
    found = with_base(text)
    assert found.kernel_options == tuple(kernel_options)
    assert found.fsync
    assert found.ignored == ()


# --- owners -------------------------------------------------------------------------------------


def test_mapping_is_disk_then_shown():
    """fuse-overlayfs shows a file of owner 5 as 100005, and stores 3 when told 100003."""
    found = with_base(b"uidmapping=0:100000:10,gidmapping=0:200000:10")
    assert found.uid_mapping is not None
    assert found.gid_mapping is not None
    assert found.uid_mapping.from_disk(5) == 100005
    assert found.uid_mapping.to_disk(100003) == 3
    assert found.gid_mapping.from_disk(5) == 200005


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, 1000), (1, 100000), (65535, 165534), (65536, 65534), (1000, 100999)],
)
def test_from_disk(number: int, shown: int):
    mapping = IdMapping((IdRange(0, 1000, 1), IdRange(1, 100000, 65535)))
    assert mapping.from_disk(number) == shown


@pytest.mark.parametrize(
    ("number", "stored"),
    [(1000, 0), (1001, None), (0, None), (100000, 1), (165534, 65535), (165535, None)],
)
def test_to_disk(number: int, stored: int | None):
    mapping = IdMapping((IdRange(0, 1000, 1), IdRange(1, 100000, 65535)))
    assert mapping.to_disk(number) == stored


def test_the_overflow_id_can_be_another():
    assert IdMapping((IdRange(0, 0, 1),), overflow=77).from_disk(5) == 77


@pytest.mark.parametrize(
    ("raw", "ranges"),
    [
        (b"0:1000:1", [(0, 1000, 1)]),
        (b":0:100:10000", [(0, 100, 10000)]),
        (b"0:1000:1:1:100000:65536", [(0, 1000, 1), (1, 100000, 65536)]),
        (b"0:0:4294967295", [(0, 0, 4294967295)]),
    ],
)
def test_mapping_triples(raw: bytes, ranges: list[tuple[int, int, int]]):
    found = with_base(b"uidmapping=" + raw).uid_mapping
    assert found == IdMapping(tuple(IdRange(*numbers) for numbers in ranges))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not triples of numbers"),
        (b"0:1000", "not triples of numbers"),
        (b"0:1000:1:1", "not triples of numbers"),
        (b"a:1000:1", "not triples of numbers"),
        (b"-1:1000:1", "not triples of numbers"),
        (b"0:1000:0", "0:1000:0 is empty"),
        (b"0:1:4294967295", "goes beyond the last id"),
        (b"0:1000:10:9:5000:10", "two ranges cover the id 9"),
        (b"0:1000:10:20:1009:10", "two ranges cover the id 1009"),
    ],
)
@pytest.mark.parametrize("key", ["uidmapping", "gidmapping"])
def test_mapping_refused(raw: bytes, says: str, key: str):
    message = refusal(b"-o", BASE + b",%s=%s" % (key.encode(), raw), b"/m")
    assert message.startswith(key + "=")
    assert says in message


@given(
    st.integers(0, 2**31), st.integers(0, 2**31), st.integers(1, 2**30), st.integers(0, 2**32 - 2)
)
def test_mapping_there_and_back(disk: int, shown: int, length: int, number: int):
    mapping = IdMapping((IdRange(disk, shown, length),))
    stored = mapping.to_disk(number)
    assert stored is None or mapping.from_disk(stored) == number


# --- other commands -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([b"--check", b"/u"], Check(b"/u")),
        ([b"--check=/u"], Check(b"/u")),
        ([b"/u", b"--check"], Check(b"/u")),
        ([b"--check", b"-o", BASE], Check(b"/u", (b"/l",), b"/w")),
        ([b"-o", b"lowerdir=/a:/b::/d", b"--check", b"u"], Check(b"u", (b"/a", b"/b", b"/d"))),
    ],
)
def test_check(argv: list[bytes], expected: Check):
    assert parse(argv) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([b"src", b"/m", b"-o", b"remount,ro"], Remount(b"/m", ("remount", "ro"))),
        ([b"/m", b"-o", b"rw,remount"], Remount(b"/m", ("remount", "rw"))),
        (
            [b"s", b"/m", b"-o", b"rw,user_id=0,allow_other,default_permissions,remount,ro,nosuid"],
            Remount(b"/m", ("remount", "ro", "nosuid")),
        ),
        ([b"s", b"/m", b"-o", BASE + b",remount,ro"], Remount(b"/m", ("remount", "ro"))),
    ],
)
def test_remount(argv: list[bytes], expected: Remount):
    assert parse(argv) == expected


# --- what libfuse is told -----------------------------------------------------------------------

NAMED = {"fsname=mica-fuse", "subtype=mica-fuse"}


@pytest.mark.parametrize(
    ("text", "euid", "told"),
    [
        (b"", 0, {"default_permissions", "allow_other", "suid", "noatime"}),
        (b"", 1000, {"default_permissions", "noatime"}),
        (b"allow_other", 1000, {"default_permissions", "allow_other", "noatime"}),
        (b"allow_root", 0, {"default_permissions", "allow_root", "suid", "noatime"}),
        (b"nosuid", 0, {"default_permissions", "allow_other", "noatime"}),
        (b"atime", 0, {"default_permissions", "allow_other", "suid"}),
        (
            b"dev,noexec",
            0,
            {"default_permissions", "allow_other", "suid", "noatime"} | {"dev", "noexec"},
        ),
        (b"rw,exec,diratime,nodiratime,nodev,async", 1000, {"default_permissions", "noatime"}),
        (b"ro", 1000, {"default_permissions", "noatime", "ro"}),
        (b"sync,dirsync", 1000, {"default_permissions", "noatime", "sync", "dirsync"}),
        (b"context=x,max_write=8192,kernel_cache", 1000, {"default_permissions", "noatime"}),
    ],
)
def test_libfuse_options(text: bytes, euid: int, told: set[str]):
    assert libfuse_options(with_base(text), euid=euid) == told | NAMED


def test_a_stack_without_upper_is_mounted_read_only():
    assert "ro" in libfuse_options(mount(b"lowerdir=/l"), euid=0)
    assert "ro" not in libfuse_options(mount(BASE), euid=0)


@pytest.mark.parametrize(
    ("text", "source", "named"),
    [
        (b"", [], {"fsname=mica-fuse", "subtype=mica-fuse"}),
        (b"", [b"src"], {"fsname=src", "subtype=mica-fuse"}),
        (b"fsname=a", [b"src"], {"fsname=a", "subtype=mica-fuse"}),
        (b"fsname=a\\,b\\\\c,subtype=t", [], {r"fsname=a\054b\134c", "subtype=t"}),
        (b"", [b"/a,b c"], {r"fsname=/a\054b c", "subtype=mica-fuse"}),
        (b"", [b"\xc3\xa4\xff\n"], {r"fsname=\303\244\377\012", "subtype=mica-fuse"}),
    ],
)
def test_names_in_proc_mounts(text: bytes, source: list[bytes], named: set[str]):
    told = libfuse_options(mount(BASE + b"," + text, *source), euid=0)
    assert {word for word in told if "=" in word} == named


# --- escaping -----------------------------------------------------------------------------------

paths = st.binary(min_size=1, max_size=30).filter(lambda path: b"\0" not in path)
awkward = st.text(alphabet='\\,:;="+/ab01é \n', min_size=1, max_size=20).map(str.encode)
any_path = (paths | awkward).map(lambda path: b"/x" + path)


@given(st.lists(any_path, min_size=1, max_size=4), any_path, any_path)
def test_escaped_paths_come_back(lowers: list[bytes], upper: bytes, work: bytes):
    text = b"lowerdir=%s,upperdir=%s,workdir=%s" % (
        b":".join(map(escape_path, lowers)),
        escape_path(upper),
        escape_path(work),
    )
    found = mount(text + b",static_nlink")
    assert (found.lowers, found.upper, found.work) == (tuple(lowers), upper, work)
    assert found.static_nlink


@given(any_path, st.lists(any_path, min_size=1, max_size=4))
def test_escaped_branches_come_back(upper: bytes, lowers: list[bytes]):
    branches = [escape_path(upper) + b"=rw", *(escape_path(lower) + b"=ro" for lower in lowers)]
    for text in (b"dirs=" + b":".join(branches), b"br:" + b";".join(branches)):
        found = mount(text + b",static_nlink")
        assert (found.upper, found.lowers) == (upper, tuple(lowers))
        assert found.static_nlink


@given(any_path)
def test_escaped_paths_may_start_anyhow(path: bytes):
    bare = path[2:]
    found = mount(b"lowerdir=/l,upperdir=" + escape_path(bare))
    assert found.upper == bare


@given(st.lists(st.binary(max_size=40) | awkward, max_size=4))
def test_any_arguments_are_obeyed_or_refused(argv: list[bytes]):
    with contextlib.suppress(UsageError):  # and no other exception
        assert parse([b"-o", *argv, b"/m"]) is not None


# --- the help, and the price --------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(options._VALUE_KEYS | options._FLAG_KEYS))
def test_help_names_every_option(key: str):
    assert key in options.USAGE


@pytest.mark.parametrize("key", sorted(options._KERNEL_FLAGS))
def test_help_names_every_flag(key: str):
    assert key in options.USAGE


def test_help_fits_a_terminal():
    assert max(map(len, options.USAGE.splitlines())) <= 100


def test_importing_the_parser_imports_nothing_heavy():
    code = "import sys, unionfs.options; print(*{'trio', 'pyfuse3', 'ctypes'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == ""
