"""Real input: a Debian root file system as the lower of a mount, changed by Debian's own tools.

apt, dpkg, perl, gcc and ld do here what they do in every image build: thousands of creates, of
links, of renames over lower files and of removals, by programs that check each result. Every test
ends with the lower as it was, to the last time stamp.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.dump import Dump, diff_dumps, dump_tree
from tests.support.rootfs import (
    AGAIN_PACKAGES,
    LATER_PACKAGES,
    RootfsUnavailableError,
    cached_rootfs,
    run_in_chroot,
    split_into_layers,
    unpack,
)
from unionfs.check import check_upper
from unionfs.client import mount

pytestmark = [pytest.mark.root, pytest.mark.fuse]

APT_TIMEOUT_S = 150
COMMAND_TIMEOUT_S = 60
FIRST_MOUNTED_FILES = 2000  # git, perl and python3 bring more than that

PROGRAM = r"""
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static void *square(void *root) { *(double *)root *= *(double *)root; return NULL; }

int main(void)
{
    double number = 12;
    pthread_t thread;
    if (pthread_create(&thread, NULL, square, &number) || pthread_join(thread, NULL))
        return EXIT_FAILURE;
    printf("%.0f\n", sqrt(number) + 2);
    return EXIT_SUCCESS;
}
"""


@dataclass(frozen=True)
class Stack:
    """The lower layers, topmost first, and what was in them before anything was mounted."""

    layers: list[Path]
    dumps: list[Dump] = field(repr=False)


@pytest.fixture(scope="module")
def rootfs_tar() -> Path:
    try:
        return cached_rootfs()
    except RootfsUnavailableError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module", params=[1, 40], ids=["one-layer", "forty-layers"])
def stack(
    request: pytest.FixtureRequest, rootfs_tar: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    base = tmp_path_factory.mktemp("debian")
    root = base / "root"
    unpack(rootfs_tar, root)
    layers = [root] if request.param == 1 else split_into_layers(root, base, request.param)
    assert len(layers) == request.param
    yield Stack(layers, [_dump(layer) for layer in layers])
    shutil.rmtree(base)


def _dump(layer: Path) -> Dump:
    return dump_tree(layer, ino=True)


@contextmanager
def _union(stack: Stack, base: Path) -> Iterator[Path]:
    """Mount the stack below an upper in `base`; afterwards judge the upper and every layer."""
    upper, work, merged = base / "upper", base / "work", base / "merged"
    for directory in (upper, work, merged):
        directory.mkdir()
    options = ["allow_other", "default_permissions", "suid", "dev"]
    mounted = mount(merged, lower=stack.layers, upper=upper, work=work, options=options)
    try:
        yield merged
    finally:
        mounted.unmount()
    for layer, before in zip(stack.layers, stack.dumps, strict=True):
        assert diff_dumps(before, _dump(layer)) == []
    lowers = [bytes(layer) for layer in stack.layers]
    assert check_upper(bytes(upper), lowers, bytes(work)) == []
    assert list(work.glob("work/*")) == []


def test_apt_installs_and_removes_packages(stack: Stack, tmp_path: Path) -> None:
    with _union(stack, tmp_path) as merged:
        apt = ["apt-get", "-qy", "--no-download", "--no-install-recommends"]
        run_in_chroot(merged, [*apt, "install", *LATER_PACKAGES], timeout_s=APT_TIMEOUT_S)
        run_in_chroot(
            merged, [*apt, "install", "--reinstall", *AGAIN_PACKAGES], timeout_s=APT_TIMEOUT_S
        )
        run_in_chroot(merged, [*apt, "purge", "gcc", "cpp"], timeout_s=APT_TIMEOUT_S)

        # dpkg reads every installed file again and compares it with the package's digests.
        assert run_in_chroot(merged, ["dpkg", "--verify"], timeout_s=COMMAND_TIMEOUT_S) == ""
        assert run_in_chroot(merged, ["dpkg", "--audit"], timeout_s=COMMAND_TIMEOUT_S) == ""
        for name in LATER_PACKAGES:
            assert run_in_chroot(merged, [name, "--version"], timeout_s=COMMAND_TIMEOUT_S)
        commit = "git init -q /r && cd /r && echo text > f && git add f && git status --porcelain"
        assert run_in_chroot(merged, ["sh", "-c", commit], timeout_s=COMMAND_TIMEOUT_S) == "A  f\n"
        assert "gcc" not in {path.name for path in (merged / "usr/bin").iterdir()}
        new = sum(1 for path in (tmp_path / "upper").rglob("*") if path.is_file())
        assert new > FIRST_MOUNTED_FILES


def test_gcc_compiles_and_its_program_runs(stack: Stack, tmp_path: Path) -> None:
    with _union(stack, tmp_path) as merged:
        (merged / "root/program.c").write_text(PROGRAM)
        for kind in ("-shared-libgcc", "-static"):
            argv = ["gcc", "-O2", "-Wall", "-Werror", kind, "-pthread", "-save-temps"]
            argv += ["-dumpdir", "/tmp/", "-o", "/usr/local/bin/program", "/root/program.c", "-lm"]
            run_in_chroot(merged, argv, timeout_s=COMMAND_TIMEOUT_S)
            assert run_in_chroot(merged, ["program"], timeout_s=COMMAND_TIMEOUT_S) == "14\n"
