"""A Debian root file system as real input: made once, cached as one tar, unpacked for each run.

The recipe is debootstrap's minimal variant with a C compiler, plus a package that a test installs
later: its archives and the package lists are already in the tree, so that the test itself needs
no network. Where the packages come from is read from apt's own configuration on the machine that
runs the tests.

    ${XDG_CACHE_HOME:-/var/cache}/mica-tests/
        debian-SUITE-ARCH-RECIPE.tar    published by one rename; RECIPE is a digest of the lists
        debian.lock                     held (flock) by whoever makes the tar
        making-*/                       scratch of the maker, removed at its end

A command runs in the tree inside its own mount, pid and network namespace: what it mounts, starts
or would send ends with it.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SUITE = "bookworm"
BASE_PACKAGES = ("gcc", "libc6-dev")
# git alone brings perl, its modules and libcurl: more than 3 000 files with links of both kinds.
LATER_PACKAGES = ("git", "python3")
# Shipped by the minimal variant already; installing it again writes over files of the lower.
AGAIN_PACKAGES = ("tzdata",)

MAKE_TIMEOUT_S = 1200
UNPACK_TIMEOUT_S = 300

# The options of the user's own apt that decide how a mirror is reached.
_PROXY_VARIABLES = {"Acquire::http::Proxy": "http_proxy", "Acquire::https::Proxy": "https_proxy"}

_DEBOOTSTRAP = ("debootstrap", "--variant=minbase")
_INDEX_TARGETS = ("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)")
_TAR = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls")

# Files below this depth stay together, so that some directories merge over many layers and
# others come whole from one.
_SPLIT_DEPTH = 4

_CHROOT_SCRIPT = """
set -e
root=$1; shift
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null zero full random urandom tty; do
    : > "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
exec chroot "$root" "$@"
"""


class RootfsUnavailableError(Exception):
    """This machine cannot make the root file system; the message says what is missing."""


class CommandFailedError(Exception):
    """A command failed; the message holds the end of what it wrote."""

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        super().__init__(f"{' '.join(argv)}: exit status {status}\n{output[-4000:]}")
        self.status = status
        self.output = output


def run(argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and return what it wrote on both streams.

    Raises:
        CommandFailedError: Its exit status was not 0.
        subprocess.TimeoutExpired: It took longer than `timeout_s`.
    """
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        env=env,
        check=False,
    )
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        raise CommandFailedError(argv, done.returncode, output)
    return output


def cached_rootfs() -> Path:
    """Return the tar of the root file system, making it if this machine has none yet.

    Raises:
        RootfsUnavailableError: A program, the privilege or a Debian mirror is missing.
        CommandFailedError: debootstrap or apt failed.
    """
    if os.geteuid() != 0:
        reason = "a Debian root file system is made by root"
        raise RootfsUnavailableError(reason)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "mica-tests"
    cache.mkdir(parents=True, exist_ok=True)
    tar = cache / f"debian-{SUITE}-{os.uname().machine}-{_recipe_digest()}.tar"
    with _locked(cache / "debian.lock"):
        if not tar.exists():
            _make(tar)
    return tar


def unpack(tar: Path, root: Path) -> None:
    """Unpack the tar into `root`, a new directory, with owners, times and xattrs."""
    root.mkdir()
    run(
        [*_TAR, "-C", str(root), "-xpf", str(tar)],
        timeout_s=UNPACK_TIMEOUT_S,
    )


def split_into_layers(root: Path, into: Path, count: int) -> list[Path]:
    """Move every file below `root` into one of `count` layers, and return them, topmost first.

    A directory stands, with its metadata, in each layer that holds something of it. Names of one
    hard-linked file stay in one layer. `root` is gone afterwards.
    """
    layers = [into / f"{number:03}" for number in range(count)]
    directories, files = _allotted(root, count)
    homes = _homes(directories, files, count)
    for path in directories:
        for number in homes[path]:
            _make_directory_like(root / path, layers[number] / path)
    stamps = {path: (root / path).stat() for path in directories}
    for path, number in files.items():
        (root / path).rename(layers[number] / path)
    for path in reversed(directories):
        (root / path).rmdir()
        times = (stamps[path].st_atime_ns, stamps[path].st_mtime_ns)
        for number in homes[path]:
            os.utime(layers[number] / path, ns=times)
    return layers


def _allotted(root: Path, count: int) -> tuple[list[Path], dict[Path, int]]:
    """Return the directories below `root`, parents first, and the layer of everything else."""
    directories: list[Path] = []
    files: dict[Path, int] = {}
    layer_by_inode: dict[int, int] = {}
    for found, directory_names, file_names in os.walk(root):
        parent = Path(found)
        directories.append(parent.relative_to(root))
        links = [name for name in directory_names if (parent / name).is_symlink()]
        for name in links + file_names:
            path = parent.relative_to(root) / name
            inode = (parent / name).lstat().st_ino
            files[path] = layer_by_inode.setdefault(inode, _hashed(path, count))
    return directories, files


def _homes(
    directories: Sequence[Path], files: Mapping[Path, int], count: int
) -> dict[Path, set[int]]:
    """Return the layers in which each directory stands; an empty one needs a place too."""
    homes = {path: {_hashed(path, count)} for path in directories}
    for path, number in files.items():
        homes[path.parent].add(number)
    for path in reversed(directories):
        if path != Path():
            homes[path.parent] |= homes[path]
    homes[Path()] = set(range(count))
    return homes


def _make_directory_like(model: Path, copy: Path) -> None:
    status = model.stat()
    copy.mkdir()
    os.chown(copy, status.st_uid, status.st_gid)
    copy.chmod(status.st_mode & 0o7777)
    for name in os.listxattr(model):
        os.setxattr(copy, name, os.getxattr(model, name))


def run_in_chroot(root: Path, argv: Sequence[str], *, timeout_s: float) -> str:
    """Run a command with `root` as its root directory, in namespaces of its own.

    It sees /proc and the harmless devices, no other process and no network.

    Raises:
        CommandFailedError: Its exit status was not 0.
    """
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    # The pid namespace dies with its first process, and that one with its parent.
    namespaces = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--net"]
    return run(
        ["unshare", *namespaces, "sh", "-c", _CHROOT_SCRIPT, "sh", str(root), *argv],
        timeout_s=timeout_s,
        env=environment,
    )


def _hashed(relative: Path, count: int) -> int:
    kept = "/".join(relative.parts[:_SPLIT_DEPTH])
    return int.from_bytes(hashlib.sha256(os.fsencode(kept)).digest()[:4], "big") % count


def _recipe_digest() -> str:
    recipe = "\n".join([SUITE, *BASE_PACKAGES, "", *LATER_PACKAGES, "", *AGAIN_PACKAGES])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(tar: Path) -> None:
    for program in ("debootstrap", "apt-get", "tar", "unshare", "chroot"):
        if shutil.which(program) is None:
            reason = f"a Debian root file system needs the program {program}"
            raise RootfsUnavailableError(reason)
    mirror = _mirror()
    scratch = Path(tempfile.mkdtemp(prefix="making-", dir=tar.parent))
    try:
        root = scratch / "root"
        run(
            [*_DEBOOTSTRAP, f"--include={','.join(BASE_PACKAGES)}", SUITE, str(root), mirror],
            timeout_s=MAKE_TIMEOUT_S,
            env={**os.environ, **_proxies()},
        )
        # apt of this machine, working on the tree: it knows the proxies and the certificates.
        apt = ["apt-get", "-q", "-o", f"Dir={root}", "-o", "APT::Sandbox::User=root"]
        apt += ["-o", f"Dir::State::status={root}/var/lib/dpkg/status"]
        for archive in (root / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        run([*apt, "update"], timeout_s=MAKE_TIMEOUT_S)
        wanted = ["install", "-y", "--download-only", "--no-install-recommends"]
        run([*apt, *wanted, *LATER_PACKAGES], timeout_s=MAKE_TIMEOUT_S)
        run([*apt, *wanted, "--reinstall", *AGAIN_PACKAGES], timeout_s=MAKE_TIMEOUT_S)
        staged = scratch / "rootfs.tar"
        run(
            [*_TAR, "-C", str(root), "-cf", str(staged), "."],
            timeout_s=UNPACK_TIMEOUT_S,
        )
        staged.rename(tar)
    finally:
        shutil.rmtree(scratch)


def _mirror() -> str:
    """Return the address from which apt on this machine fetches `SUITE`.

    Raises:
        RootfsUnavailableError: No apt here, or its sources do not name the suite.
    """
    wanted = [SUITE, "main"]
    listing = run(
        [*_INDEX_TARGETS, "Identifier: Packages"],
        timeout_s=60,
    )
    for line in listing.splitlines():
        fields = line.split()
        if fields[1:] == wanted:
            return fields[0]
    reason = f"apt's sources on this machine do not name Debian {SUITE}"
    raise RootfsUnavailableError(reason)


def _proxies() -> dict[str, str]:
    """Return the proxies that apt is told to use, as the variables that debootstrap heeds."""
    found: dict[str, str] = {}
    for option, variable in _PROXY_VARIABLES.items():
        value = run(["apt-config", "dump", "--no-empty", "--format", "%v", option], timeout_s=60)
        if value and value != "DIRECT":
            found[variable] = value
    return found
