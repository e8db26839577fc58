r"""The mount program's command line: bytes in, one `Command` out.

The spellings are fuse-overlayfs's, the kernel's overlayfs's and aufs's, so that callers of any of
them need no change.  A pure parser: it touches no disk, resolves no path and decides nothing that
depends on the machine.

How an option string is read (`-o a=1,b=2`; several `-o` add up, the last word on a subject wins):

- a comma ends an option, unless it is escaped (`\,`) or stands in quotes.  A quote opens only where
  a value or a directory in it begins (after `=`, `:` or `;`); any other quote is part of a name;
- in a path, a backslash makes the next character an ordinary one (`\:` in `lowerdir`), and three
  octal digits after it are a byte (`\040`), as /proc/mounts prints and libfuse reads them.
  `escape_path` is the inverse.

Sources: fuse-overlayfs main.c (tag v1.9) and src/config.rs (2.0); libfuse lib/fuse_opt.c and
lib/mount.c (3.14); Linux Documentation/filesystems/overlayfs.rst; aufs(5), "Branch Syntax";
mount(8), "EXTERNAL HELPERS".
"""

from __future__ import annotations

import itertools
import math
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

OVERFLOW_ID = 65534
"""The owner shown for an owner that no mapping covers (the kernel's default overflowuid)."""

MAX_ID = 2**32 - 2
"""The largest uid or gid; the next number, (uid_t)-1, means "leave it" to chown(2)."""

MIN_WRITE_BYTES = 4096
"""The kernel raises any smaller `max_write` to one page (fs/fuse/inode.c)."""

PROGRAM = "mica-fuse"


class UsageError(Exception):
    """The command line cannot be obeyed; its one line says what, why and what to do."""


@dataclass(frozen=True, slots=True)
class IdRange:
    """One triple of `uidmapping=DISK:SHOWN:LENGTH[:...]`.

    Attributes:
        disk: The first owner of the range as the layers store it.
        shown: The first owner as the mount's users see it.
        length: How many owners in a row.
    """

    disk: int
    shown: int
    length: int


@dataclass(frozen=True, slots=True)
class IdMapping:
    """Owners on disk against owners in the mount.

    The order is fuse-overlayfs's, and podman's (container id, host id, size): layers store the
    container's numbers, and the mount shows the host's, which the container's user namespace turns
    back.  With `0:100000:65536` a file that root owns in a layer is shown as owned by 100000.
    """

    ranges: tuple[IdRange, ...]
    overflow: int = OVERFLOW_ID

    def from_disk(self, number: int) -> int:
        """The owner to show for the owner `number` in a layer; `overflow` outside every range."""
        for part in self.ranges:
            if part.disk <= number < part.disk + part.length:
                return part.shown + number - part.disk
        return self.overflow

    def to_disk(self, number: int) -> int | None:
        """The owner to store when a user of the mount says `number`; None outside every range.

        fuse-overlayfs stores the overflow id then, which nobody can have meant.
        """
        for part in self.ranges:
            if part.shown <= number < part.shown + part.length:
                return part.disk + number - part.shown
        return None


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What to mount, where and how.  Paths are as given: perhaps relative, perhaps missing.

    Attributes:
        mountpoint: Where.
        source: What `mount SOURCE MOUNTPOINT` named; shown in /proc/mounts without an `fsname`.
        lowers: The read-only directories, topmost first; at least one.
        data_lowers: Directories that only hold data for metacopies (`::`), topmost first.
        upper: The directory that takes the changes; None for a read-only stack.
        work: The work directory; None with an upper when none was named (aufs's spelling has none).
        read_only: `ro` was asked for; a stack without an upper is read-only anyhow.
        foreground: Do not become a daemon.
        debug: Log every request; implies `foreground`.
        timeout_s: How long the kernel may trust names and attributes; None for ever.
        uid_mapping: Owners on disk against owners shown; None for unchanged.
        gid_mapping: The same for groups.
        squash_to_root: Show every owner and group as 0.  All squashing is of what is shown only.
        squash_to_uid: Show this owner for every file; goes before `squash_to_root`.
        squash_to_gid: Show this group for every file; goes before `squash_to_root`.
        volatile: A crash may cost everything: nothing is ever synced.
        fsync: fsync(2) and copy-up reach the disk; False with `volatile` or `fsync=0`.
        acl: POSIX ACLs are honoured.
        xattrs: Extended attributes are shown and stored.
        xattr_permissions: Where owner and mode of upper files live: 0 in the inode, 1 in the
            attribute security.fuseoverlayfs.override_stat, 2 in user.containers.override_stat.
        redirect_dir: Directories of lower layers may be renamed in place; False refuses (EXDEV).
            Redirects that are there already are followed in either case.
        metacopy: A change of metadata alone does not copy data.
        userxattr: Markers go to the `user.` namespace; None when nothing was said.
        xino: Inode numbers carry their layer where layers span devices.
        ino32: Inode numbers fit into 32 bits.
        static_nlink: Directories show a link count of 1 instead of counting their subdirectories.
        max_write: The largest write request in bytes; None for the default.
        fsname: The source in /proc/mounts.
        subtype: The X of the type `fuse.X` in /proc/mounts.
        context: The SELinux context of every file.
        kernel_options: Flags for the mount itself, opposites already settled (the later one stays).
        ignored: What nobody knew; to be reported as `unknown argument ignored: X`.
    """

    mountpoint: bytes
    lowers: tuple[bytes, ...]
    data_lowers: tuple[bytes, ...] = ()
    source: bytes | None = None
    upper: bytes | None = None
    work: bytes | None = None
    read_only: bool = False
    foreground: bool = False
    debug: bool = False
    timeout_s: float | None = None
    uid_mapping: IdMapping | None = None
    gid_mapping: IdMapping | None = None
    squash_to_root: bool = False
    squash_to_uid: int | None = None
    squash_to_gid: int | None = None
    volatile: bool = False
    fsync: bool = True
    acl: bool = True
    xattrs: bool = True
    xattr_permissions: int = 0
    redirect_dir: bool = True
    metacopy: bool = True
    userxattr: bool | None = None
    xino: bool = True
    ino32: bool = False
    static_nlink: bool = False
    max_write: int | None = None
    fsname: bytes | None = None
    subtype: bytes | None = None
    context: bytes | None = None
    kernel_options: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mount:
    """Mount a stack and serve it."""

    options: MountOptions


@dataclass(frozen=True, slots=True)
class Remount:
    """Change the flags of a live mount: `mount -o remount,ro MNT` calls the mount program, too.

    Attributes:
        mountpoint: Which one.
        flags: What the kernel is to change, `remount` first; the stack itself stays as it is.
    """

    mountpoint: bytes
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """List the contradictions of an upper (`--check`)."""

    upper: bytes
    lowers: tuple[bytes, ...] = ()
    work: bytes | None = None


@dataclass(frozen=True, slots=True)
class Help:
    """Print `USAGE`."""


@dataclass(frozen=True, slots=True)
class Version:
    """Print the version."""


Command = Mount | Remount | Check | Help | Version


def parse(argv: Sequence[bytes]) -> Command:
    """Read the arguments that follow the program's name.

    Raises:
        UsageError: They cannot be obeyed.
    """
    words = _Words()
    rest = iter(argv)
    for argument in rest:
        if argument in _HELP:
            return Help()
        if argument in _VERSION:
            return Version()
        _take_argument(words, argument, rest)
    if words.check:
        return _check(words)
    if "remount" in words.flags:
        flags = tuple(flag for flag in words.kernel if flag in _REMOUNT_FLAGS)
        return Remount(_mountpoint(words), ("remount", *flags))
    return Mount(_mount_options(words))


def libfuse_options(options: MountOptions, *, euid: int) -> frozenset[str]:
    """What libfuse is to be told, in any order.

    As with fuse-overlayfs, root gets `allow_other` and `suid`, and everybody `default_permissions`
    and `noatime`, unless they said otherwise.  Words that libfuse takes for granted, and those that
    it would refuse, are left out.
    """
    given = frozenset(options.kernel_options)
    told = {"default_permissions"} | (given & _LIBFUSE_FLAGS)
    if euid == 0 and "allow_root" not in given:
        told.add("allow_other")
    if euid == 0 and "nosuid" not in given:
        told.add("suid")
    if "atime" not in given:
        told.add("noatime")
    if options.read_only or options.upper is None:
        told.add("ro")
    told.add("fsname=" + _for_libfuse(options.fsname or options.source or PROGRAM.encode()))
    told.add("subtype=" + _for_libfuse(options.subtype or PROGRAM.encode()))
    return frozenset(told)


def escape_path(path: bytes) -> bytes:
    """Write a path so that any path-valued option reads back exactly this path."""
    return re.sub(rb'([\\,:;="+])', rb"\\\1", path)


# --- from arguments to words ----------------------------------------------------------------------

_HELP = frozenset({b"-h", b"--help"})
_VERSION = frozenset({b"-V", b"--version"})

_OPPOSITES = {
    "suid": "nosuid",
    "dev": "nodev",
    "exec": "noexec",
    "atime": "noatime",
    "diratime": "nodiratime",
    "ro": "rw",
    "allow_other": "allow_root",
    "sync": "async",
}
_OPPOSITE_OF = _OPPOSITES | {second: first for first, second in _OPPOSITES.items()}
_KERNEL_FLAGS = frozenset(_OPPOSITE_OF) | {"default_permissions", "dirsync"}
# libfuse 3.14 refuses a mount with (no)diratime; the other flags missing here are its defaults.
_LIBFUSE_FLAGS = frozenset(
    {"allow_other", "allow_root", "default_permissions", "suid", "dev", "noexec", "noatime"}
    | {"ro", "sync", "dirsync"}
)
_REMOUNT_FLAGS = _KERNEL_FLAGS - {"allow_other", "allow_root", "default_permissions"}

_VALUE_KEYS = frozenset(
    {"lowerdir", "upperdir", "workdir", "dirs", "br", "redirect_dir", "metacopy", "context"}
    | {"uidmapping", "gidmapping", "squash_to_uid", "squash_to_gid", "timeout", "xattr_permissions"}
    | {"fsync", "noxattrs", "xino", "max_write", "fsname", "subtype"}
)
_FLAG_KEYS = frozenset(
    {"squash_to_root", "static_nlink", "volatile", "noacl", "noxattrs", "ino32_t", "userxattr"}
    | {"debug", "remount"}
)
# Right words that change nothing here: knobs of other implementations, and words for mount(8).
_WITHOUT_EFFECT = frozenset(
    {"threaded", "writeback", "fast_ino", "fast_ino_check", "plugins", "index", "nfs_export"}
    | {"uuid", "clone_fd", "max_idle_threads", "max_threads", "noxino", "kernel_cache"}
    | {"splice_read", "splice_write", "splice_move", "relatime", "norelatime", "strictatime"}
    | {"nostrictatime", "lazytime", "nolazytime", "defaults", "auto", "noauto", "user", "nouser"}
    | {"users", "owner", "group", "nofail", "_netdev", "silent", "loud", "user_id", "group_id"}
    | {"rootmode", "comment"}
)
_SAME_KEY = {"sync": "fsync"}  # fuse-overlayfs 2.0 and its tests say sync=0
_MOUNT_HELPER_SWITCHES = frozenset({b"-n", b"-s", b"-v"})  # mount(8), "EXTERNAL HELPERS"


@dataclass(slots=True)
class _Words:
    """What was said, before it is understood; escapes are still in the values."""

    values: dict[str, bytes] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    kernel: dict[str, None] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    positionals: list[bytes] = field(default_factory=list)
    foreground: bool = False
    check: bool = False


def _take_argument(words: _Words, argument: bytes, rest: Iterator[bytes]) -> None:
    """Take one argument, and from `rest` what belongs to it."""
    if argument == b"--":
        words.positionals.extend(rest)
    elif argument == b"-" or not argument.startswith(b"-"):
        words.positionals.append(argument)
    elif argument == b"-o":
        _take_options(words, _value_of(argument, rest))
    elif argument.startswith(b"-o"):
        _take_options(words, argument[2:])
    elif argument.startswith(b"--check="):
        words.check = True
        words.positionals.append(argument.removeprefix(b"--check="))
    else:
        _take_switch(words, argument, rest)


def _take_switch(words: _Words, argument: bytes, rest: Iterator[bytes]) -> None:
    if argument == b"--check":
        words.check = True
    elif argument == b"-f":
        words.foreground = True
    elif argument in {b"-d", b"--debug"}:
        words.flags.add("debug")
    elif argument == b"-t":  # mount(8) tells its helpers the type
        _value_of(argument, rest)
    elif argument not in _MOUNT_HELPER_SWITCHES:
        words.ignored.append(_text(argument))


def _value_of(switch: bytes, rest: Iterator[bytes]) -> bytes:
    value = next(rest, None)
    if value is None:
        msg = f"{_text(switch)} must be followed by a value; see --help"
        raise UsageError(msg)
    return value


def _take_options(words: _Words, text: bytes) -> None:
    for item in _split_options(text):
        if item.startswith(b"br:"):  # aufs's second spelling of br=
            words.values["br"] = item[3:]
            continue
        name, equals, value = item.partition(b"=")
        key = _text(name)
        if equals:
            _take_value(words, key, value)
        else:
            _take_flag(words, key)


def _take_value(words: _Words, key: str, value: bytes) -> None:
    key = _SAME_KEY.get(key, key)
    if key in _VALUE_KEYS:
        words.values[key] = value
    elif not _is_without_effect(key):
        words.ignored.append(f"{key}={_text(value)}")


def _take_flag(words: _Words, key: str) -> None:
    if key in _KERNEL_FLAGS:
        words.kernel.pop(_OPPOSITE_OF.get(key, ""), None)
        words.kernel[key] = None
    elif key in _FLAG_KEYS:
        words.flags.add(key)
        words.values.pop(key, None)
    elif not _is_without_effect(key):
        words.ignored.append(key)


def _is_without_effect(key: str) -> bool:
    return key in _WITHOUT_EFFECT or key.startswith(("x-", "X-"))


_OPTION_TOKEN = re.compile(rb'\\.|[^\\",=:;]+|.', re.DOTALL)
_PATH_TOKEN = re.compile(rb"\\.|[^\\:;]+|.", re.DOTALL)


def _split_options(text: bytes) -> list[bytes]:
    """Split at commas.  Escapes stay; quotes go, the commas between them become escaped."""
    items = [bytearray()]
    quoted = False
    may_quote = False
    for token in _OPTION_TOKEN.findall(text):
        if token == b'"' and (quoted or may_quote):
            quoted = not quoted
        elif token == b"," and not quoted:
            items.append(bytearray())
        else:
            items[-1] += b"\\," if token == b"," else token
        may_quote = token in {b"=", b":", b";"}
    if quoted:
        item = _shortened(bytes(items[-1]))
        msg = f'the quotation mark in {item} is not closed; close it, or write \\" for a plain one'
        raise UsageError(msg)
    return [bytes(item) for item in items if item]


def _split_paths(raw: bytes, separators: bytes) -> list[bytes]:
    """Split a list of paths, empty ones kept, escapes kept."""
    parts = [bytearray()]
    for token in _PATH_TOKEN.findall(raw):
        if len(token) == 1 and token in separators:
            parts.append(bytearray())
        else:
            parts[-1] += token
    return [bytes(part) for part in parts]


def _unescape(raw: bytes) -> bytes:
    return re.sub(rb"\\([0-3][0-7]{2}|.)", _escaped_byte, raw, flags=re.DOTALL)


def _escaped_byte(match: re.Match[bytes]) -> bytes:
    escaped = match[1]
    return escaped if len(escaped) == 1 else bytes([int(escaped, 8)])


def _for_libfuse(value: bytes) -> str:
    """A value as libfuse's own option parser wants it; in ASCII, all that pyfuse3 hands on."""
    return re.sub(rb"[\\,]|[^ -~]", _escape_for_libfuse, value).decode("ascii")


def _escape_for_libfuse(match: re.Match[bytes]) -> bytes:
    return b"\\%03o" % match[0][0]


def _text(value: bytes) -> str:
    return os.fsdecode(value)


# --- from words to meanings -----------------------------------------------------------------------


def _check(words: _Words) -> Check:
    upper = _path(words, "upperdir")
    if words.positionals:
        upper = words.positionals[-1]
    if not upper or len(words.positionals) > 1:
        msg = "--check wants one directory; say --check UPPER"
        raise UsageError(msg)
    lowers: tuple[bytes, ...] = ()
    if "lowerdir" in words.values:
        ordinary, data = _lower_directories(words.values["lowerdir"])
        lowers = ordinary + data
    return Check(upper, lowers, _path(words, "workdir"))


def _mount_options(words: _Words) -> MountOptions:
    mountpoint = _mountpoint(words)
    lowers, data_lowers, upper = _layers(words)
    fsync = _boolean(words, "fsync", default=True)
    volatile = "volatile" in words.flags
    debug = "debug" in words.flags
    return MountOptions(
        mountpoint=mountpoint,
        lowers=lowers,
        data_lowers=data_lowers,
        source=(words.positionals[0] or None) if len(words.positionals) > 1 else None,
        upper=upper,
        work=_path(words, "workdir") if upper is not None else None,
        read_only="ro" in words.kernel,
        foreground=words.foreground or debug,
        debug=debug,
        timeout_s=_timeout(words),
        uid_mapping=_mapping(words, "uidmapping"),
        gid_mapping=_mapping(words, "gidmapping"),
        squash_to_root="squash_to_root" in words.flags,
        squash_to_uid=_number(words, "squash_to_uid", 0, MAX_ID),
        squash_to_gid=_number(words, "squash_to_gid", 0, MAX_ID),
        volatile=volatile,
        fsync=fsync and not volatile,
        acl="noacl" not in words.flags,
        xattrs=not _boolean(words, "noxattrs", default="noxattrs" in words.flags),
        xattr_permissions=_number(words, "xattr_permissions", 0, 2) or 0,
        redirect_dir=_one_of(words, "redirect_dir", _REDIRECT_DIR, default=True),
        metacopy=_one_of(words, "metacopy", _ON_OFF, default=True),
        userxattr=True if "userxattr" in words.flags else None,
        xino=_xino(words),
        ino32="ino32_t" in words.flags,
        static_nlink="static_nlink" in words.flags,
        max_write=_number(words, "max_write", MIN_WRITE_BYTES, 2**31 - 1),
        fsname=_plain(words, "fsname"),
        subtype=_plain(words, "subtype"),
        context=_plain(words, "context"),
        kernel_options=tuple(words.kernel),
        ignored=tuple(words.ignored),
    )


def _mountpoint(words: _Words) -> bytes:
    if not words.positionals or not words.positionals[-1]:
        msg = "no mountpoint given; name the directory to mount on as the last argument (--help)"
        raise UsageError(msg)
    if len(words.positionals) > 2:
        names = " ".join(map(_text, words.positionals))
        msg = f"too many arguments: {names}; expected [SOURCE] MOUNTPOINT (quote paths with spaces)"
        raise UsageError(msg)
    return words.positionals[-1]


def _layers(words: _Words) -> tuple[tuple[bytes, ...], tuple[bytes, ...], bytes | None]:
    """The ordinary lowers, the data-only lowers and the upper, in whichever spelling."""
    overlay = [key for key in ("lowerdir", "upperdir") if key in words.values]
    branches = [key for key in ("dirs", "br") if key in words.values]
    if len(branches) > 1 or (branches and overlay):
        keys = " and ".join(f"{key}=" for key in overlay + branches)
        msg = f"{keys} both name the directories to stack; use one spelling"
        raise UsageError(msg)
    if branches:
        lowers, upper = _branches(branches[0], words.values[branches[0]])
        return lowers, (), upper
    if "lowerdir" not in words.values:
        msg = "no lowerdir specified: name what to stack, -o lowerdir=DIR[:DIR...]"
        raise UsageError(msg)
    ordinary, data = _lower_directories(words.values["lowerdir"])
    return ordinary, data, _path(words, "upperdir")


def _lower_directories(raw: bytes) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """`A:B::D`: the ordinary layers A and B, the data-only layer D.

    A stray colon at either end is let pass, as fuse-overlayfs does.
    """
    parts = _split_paths(raw, b":")
    if len(parts) > 1 and not parts[0]:
        del parts[0]
    if len(parts) > 1 and not parts[-1]:
        del parts[-1]
    ordinary: list[bytes] = []
    data: list[bytes] = []
    data_next = False
    for part in parts:
        if part and (data_next or not data):
            (data if data_next else ordinary).append(_lower_directory(part))
            data_next = False
        elif part or data_next or not ordinary:
            raise _bad_lowerdir(raw)
        else:
            data_next = True
    if data_next:
        raise _bad_lowerdir(raw)
    return tuple(ordinary), tuple(data)


def _bad_lowerdir(raw: bytes) -> UsageError:
    return UsageError(
        f"lowerdir={_shortened(raw)}: a directory is missing between colons; write A:B for layers,"
        " A:B::D for data-only layers after them, and \\: for a colon in a name"
    )


def _lower_directory(raw: bytes) -> bytes:
    if raw.startswith(b"//"):
        msg = (
            f"lowerdir={_shortened(raw)}: two slashes ask for a plugin of fuse-overlayfs, and there"
            " are none here; unpack the layer and name its directory with one slash"
        )
        raise UsageError(msg)
    return _real_path("lowerdir", raw)


_BRANCH_ACCESS = re.compile(rb"(rw|ro|rr)((?:\+[a-z_0-9]+)*)", re.IGNORECASE)
# aufs(5), "Branch Syntax".  Whiteouts are read in every layer; the others have no use here.
_BRANCH_ATTRIBUTES = frozenset(
    {b"wh", b"nolwh", b"unpin", b"fhsm", b"coo_reg", b"coo_all", b"moo", b"icex", b"icexsec"}
    | {b"icexsys", b"icextr", b"icexusr", b"icexoth"}
)


def _branches(key: str, raw: bytes) -> tuple[tuple[bytes, ...], bytes | None]:
    """The lowers and the upper of aufs's `A=rw:B=ro`; unmarked, only the first is writable."""
    upper: bytes | None = None
    lowers: list[bytes] = []
    for position, branch in enumerate(part for part in _split_paths(raw, b":;") if part):
        name, access = _branch_access(branch)
        path = _real_path(key, name)
        if access == b"rw" or (access is None and position == 0):
            if position > 0:
                raise _misplaced_branch(path, upper)
            upper = path
        else:
            lowers.append(path)
    if not lowers:
        why = f"no read-only directory to stack; write {key}=UPPER=rw:LOWER=ro"
        msg = f"{key}={_shortened(raw)}: {why}"
        raise UsageError(msg)
    return tuple(lowers), upper


def _misplaced_branch(path: bytes, upper: bytes | None) -> UsageError:
    if upper is None:
        return UsageError(
            f"{_text(path)}=rw stands below a read-only directory, which would hide what is"
            " written; put the writable one first"
        )
    return UsageError(
        f"{_text(upper)} and {_text(path)} are both writable, and only one directory can take the"
        f" changes; write {_text(path)}=ro"
    )


def _branch_access(branch: bytes) -> tuple[bytes, bytes | None]:
    """Split `DIR=rw+attribute` into the directory and the access, None when none is given."""
    name, access = _cut_at_last_equals(branch)
    if access is None or b"/" in access:
        return branch, None
    match = _BRANCH_ACCESS.fullmatch(access)
    attributes = match[2].lower().split(b"+")[1:] if match else []
    if match is None or not _BRANCH_ATTRIBUTES.issuperset(attributes):
        msg = (
            f"{_text(branch)}: {_text(access)!r} is no access to a directory;"
            " use rw, ro or rr, or write \\= for an equals sign in a name"
        )
        raise UsageError(msg)
    return name, match[1].lower()


def _cut_at_last_equals(branch: bytes) -> tuple[bytes, bytes | None]:
    """Cut at the last equals sign that is not escaped."""
    tokens = re.finditer(rb"\\.|=", branch, re.DOTALL)
    cuts = [token.start() for token in tokens if token[0] == b"="]
    if not cuts:
        return branch, None
    return branch[: cuts[-1]], branch[cuts[-1] + 1 :]


def _path(words: _Words, key: str) -> bytes | None:
    raw = words.values.get(key)
    return None if raw is None else _real_path(key, raw)


def _real_path(key: str, raw: bytes) -> bytes:
    path = _unescape(raw)
    if not path or b"\0" in path:
        msg = f"{key}={_shortened(raw)}: this names no directory; give its path"
        raise UsageError(msg)
    return path


def _plain(words: _Words, key: str) -> bytes | None:
    """A free text; an empty one says nothing."""
    return _unescape(words.values.get(key, b"")) or None


def _refused(words: _Words, key: str, why: str) -> UsageError:
    return UsageError(f"{key}={_shortened(words.values[key])}: {why}")


def _shortened(raw: bytes) -> str:
    longest = 200
    text = _text(raw)
    return text if len(text) <= longest else text[:longest] + "..."


_INTEGER = re.compile(rb"[+-]?[0-9]{1,20}")
_SECONDS = re.compile(rb"\+?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|\+?inf(?:inity)?")


def _number(words: _Words, key: str, least: int, most: int) -> int | None:
    raw = words.values.get(key)
    if raw is None:
        return None
    if _INTEGER.fullmatch(raw) and least <= int(raw) <= most:
        return int(raw)
    why = f"not a whole number from {least} to {most}; give one, without a unit"
    raise _refused(words, key, why)


def _boolean(words: _Words, key: str, *, default: bool) -> bool:
    """`KEY=0` or `KEY=1`; as in C, every other integer is true."""
    raw = words.values.get(key)
    if raw is None:
        return default
    if _INTEGER.fullmatch(raw):
        return int(raw) != 0
    raise _refused(words, key, "not a yes or no; write 1 or 0")


def _timeout(words: _Words) -> float | None:
    raw = words.values.get("timeout")
    if raw is None:
        return None
    if not _SECONDS.fullmatch(raw):
        why = "not a number of seconds; give one from 0 up, or leave it out for no limit"
        raise _refused(words, "timeout", why)
    seconds = float(raw)
    return seconds if math.isfinite(seconds) else None


_ON_OFF = {b"on": True, b"off": False}
_REDIRECT_DIR = _ON_OFF | {b"follow": False, b"nofollow": False}


def _one_of(words: _Words, key: str, meanings: dict[bytes, bool], *, default: bool) -> bool:
    raw = words.values.get(key)
    if raw is None:
        return default
    if raw not in meanings:
        raise _refused(words, key, f"no such choice; use one of {_text(b', '.join(meanings))}")
    return meanings[raw]


def _xino(words: _Words) -> bool:
    if words.values.get("xino", b"").startswith(b"/"):
        return True  # aufs's: a file for a table that is not needed here
    return _one_of(words, "xino", _ON_OFF | {b"auto": True}, default=True)


def _mapping(words: _Words, key: str) -> IdMapping | None:
    raw = words.values.get(key)
    if raw is None:
        return None
    numbers = [part for part in raw.split(b":") if part]  # podman may lead with a colon
    digits = all(re.fullmatch(rb"[0-9]{1,20}", number) for number in numbers)
    if not numbers or len(numbers) % 3 or not digits:
        why = "not triples of numbers; write DISK:SHOWN:LENGTH[:DISK:SHOWN:LENGTH...]"
        raise _refused(words, key, why)
    values = [int(number) for number in numbers]
    ranges = tuple(IdRange(*values[at : at + 3]) for at in range(0, len(values), 3))
    for part in ranges:
        if part.length == 0 or max(part.disk, part.shown) + part.length - 1 > MAX_ID:
            shown = f"{part.disk}:{part.shown}:{part.length}"
            why = f"{shown} is empty or goes beyond the last id, {MAX_ID}; correct its length"
            raise _refused(words, key, why)
    _refuse_overlap(words, key, ranges, lambda part: part.disk)
    _refuse_overlap(words, key, ranges, lambda part: part.shown)
    return IdMapping(ranges)


def _refuse_overlap(
    words: _Words, key: str, ranges: Iterable[IdRange], start: Callable[[IdRange], int]
) -> None:
    ordered = sorted(ranges, key=start)
    for first, second in itertools.pairwise(ordered):
        if start(first) + first.length > start(second):
            why = f"two ranges cover the id {start(second)}; make them disjoint"
            raise _refused(words, key, why)


USAGE = f"""\
usage: {PROGRAM} [-f] [-d] [-o OPTION[,OPTION...]]... [SOURCE] MOUNTPOINT
       {PROGRAM} --check UPPER [-o lowerdir=DIR[:DIR...],workdir=DIR]
       {PROGRAM} --help | --version

Stacks directories into one.  A name is read from the topmost directory that has it; all changes go
to upperdir.

    -f                          stay in the foreground
    -d, --debug, -o debug       log every request; implies -f
    --check UPPER               list the contradictions in an upper directory; exit 1 if any
    -h, --help                  show this
    -V, --version               show the version

The stack (\\: is a colon in a name, \\, a comma; quotes protect commas):
    lowerdir=DIR[:DIR...][::DIR...]  read-only directories, topmost first; after :: for data only
    upperdir=DIR                takes all changes; without it the mount is read-only
    workdir=DIR                 on upperdir's file system, for mica alone; default: beside upperdir
    dirs=DIR=rw:DIR=ro[:...]    the same in aufs's spelling; also br: and br=, and ; for :

Owners:
    uidmapping=DISK:SHOWN:LENGTH[:...]  owners in the layers and as shown, in ranges
    gidmapping=DISK:SHOWN:LENGTH[:...]  the same for groups
    squash_to_root              show root as every owner and group
    squash_to_uid=UID           show one owner for everything
    squash_to_gid=GID           show one group for everything
    xattr_permissions=0         owner and mode are kept in the inode; 1 and 2, which would keep them
                                in attributes, are refused

Behaviour:
    volatile                    sync nothing: fast, and lost in a crash
    fsync=0|1, sync=0|1         whether fsync and copy-up reach the disk (1)
    timeout=SECONDS             how long the kernel may trust what it was told (no limit)
    redirect_dir=on|off         on: rename directories of lower layers in place; off, follow or
                                nofollow: refuse to (EXDEV), so that programs copy them (on)
    metacopy=on|off             on: a change of metadata does not copy data (on)
    userxattr                   keep markers in user.overlay.* (where trusted.* is forbidden)
    noacl                       no POSIX ACLs
    noxattrs=0|1, noxattrs      no extended attributes
    xino=on|off|auto            layers kept apart in inode numbers
    ino32_t                     inode numbers of 32 bits
    static_nlink                directories show one link
    max_write=BYTES             the largest write request, from {MIN_WRITE_BYTES}
    context=CONTEXT             SELinux context

The mount:
    fsname=NAME, subtype=NAME   source and type in /proc/mounts (SOURCE or {PROGRAM}, {PROGRAM})
    ro, rw                      read-only or not
    allow_other, allow_root     who besides the mounting user may enter (root: allow_other)
    default_permissions         always on
    suid, nosuid                set-user-id programs (root: suid)
    dev, nodev                  device nodes (nodev)
    exec, noexec                programs (exec)
    atime, noatime              access times (noatime)
    sync, async, dirsync        synchronous writes (async)
    remount                     with ro, rw or other flags: change a live mount

Accepted without effect: diratime, nodiratime, threaded=, writeback=, fast_ino=, fast_ino_check=,
plugins=, index=, nfs_export=, uuid=, splice_read, splice_write, splice_move, kernel_cache,
relatime, lazytime and their opposites, and what fstab(5) knows.  Anything else is reported and
ignored.
"""
