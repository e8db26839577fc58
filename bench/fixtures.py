"""The layers under the workloads, made once per run of the benchmark below the scratch folder.

    scratch/fixtures/debian/    13 600 entries copied from this machine's own /usr, always the same
                     wide/      100 000 empty files, 1 000 to a directory
                     large/     a file to copy up and one to read at random, without holes
                     layers/NN/ 100 small layers
                     files.txt  the files of debian/ that tar reads
                     untar.tar  the archive that is unpacked

No workload writes here: lower layers are what a union never changes.
"""

import os
import random
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from bench.child import run

USR = Path("/usr")
# Share of the tree that each folder of /usr gives, like a small Debian system with a compiler.
SECTIONS = {"include": 0.25, "bin": 0.08, "lib": 0.27, "share": 0.40}
LARGEST_COPY_BYTES = 256 * 1024
BLOCK_BYTES = 1024 * 1024
FILES_PER_DIRECTORY = 1000
FILES_PER_LAYER = 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything there is."""

    tree_entries: int = 13_600
    tar_files: int = 7_400
    untar_files: int = 2_600
    new_files: int = 5_000
    write_mib: int = 512
    compiles: int = 5
    opens: int = 1_000
    wide_files: int = 100_000
    copy_up_mib: int = 1024
    layers: int = 100
    random_file_mib: int = 256
    random_reads: int = 5_000


FULL = Sizes()
QUICK = Sizes(1_360, 740, 260, 500, 51, 1, 100, 10_000, 102, 10, 26, 500)


class Fixtures:
    """Each layer is made when it is first asked for, so `--only` makes only what it needs."""

    def __init__(self, scratch: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self.root = scratch / "fixtures"
        self.root.mkdir()

    @cached_property
    def debian(self) -> Path:
        """A tree shaped like a Debian system."""
        tree = self.root / "debian"
        (tree / "usr").mkdir(parents=True)
        count = 2
        for section, share in SECTIONS.items():
            quota = int(share * self.sizes.tree_entries)
            for source in islice(breadth_first(USR / section), quota):
                _copy_entry(source, tree / "usr" / source.relative_to(USR))
                count += 1
        _fill(tree / "filler", self.sizes.tree_entries - count)
        return tree

    @cached_property
    def tree_files(self) -> list[str]:
        """The regular files of the tree, relative to it, sorted."""
        found = [
            os.path.relpath(Path(folder, name), self.debian)
            for folder, _, names in os.walk(self.debian)
            for name in names
            if stat.S_ISREG(Path(folder, name).lstat().st_mode)
        ]
        return sorted(found)

    @cached_property
    def tar_list(self) -> Path:
        """A file that names what tar reads."""
        listing = self.root / "files.txt"
        listing.write_text("\n".join(self.tree_files[: self.sizes.tar_files]) + "\n")
        return listing

    @cached_property
    def archive(self) -> Path:
        """The archive that is unpacked: files from every part of the tree."""
        step = max(1, len(self.tree_files) // self.sizes.untar_files)
        names = self.root / "untar.txt"
        chosen = self.tree_files[::step][: self.sizes.untar_files]
        names.write_text("\n".join(chosen) + "\n")
        path = self.root / "untar.tar"
        run(["tar", "-C", str(self.debian), "-cf", str(path), "-T", str(names)])
        return path

    @cached_property
    def wide(self) -> Path:
        """Many empty files."""
        top = self.root / "wide"
        for number in range(self.sizes.wide_files // FILES_PER_DIRECTORY):
            folder = top / f"d{number // 10}" / f"d{number % 10}"
            folder.mkdir(parents=True)
            _empty_files(folder, FILES_PER_DIRECTORY)
        return top

    @cached_property
    def flat(self) -> Path:
        """One directory with as many files as are unlinked."""
        top = self.root / "flat"
        (top / "files").mkdir(parents=True)
        _empty_files(top / "files", self.sizes.new_files)
        return top

    @cached_property
    def large(self) -> Path:
        """Two large files: one to copy up, one to read at random."""
        top = self.root / "large"
        top.mkdir()
        _fill_file(top / "copyup", self.sizes.copy_up_mib)
        _fill_file(top / "random", self.sizes.random_file_mib)
        return top

    @cached_property
    def layers(self) -> list[Path]:
        """Many small layers that share some names, topmost first."""
        made = []
        for number in range(self.sizes.layers):
            layer = self.root / "layers" / f"{number:02}"
            (layer / "shared").mkdir(parents=True)
            _empty_files(layer, FILES_PER_LAYER, prefix=f"l{number}-")
            _empty_files(layer / "shared", FILES_PER_LAYER, prefix=f"l{number % 7}-")
            made.append(layer)
        return made


def breadth_first(top: Path) -> Iterator[Path]:
    """Every directory, file and symlink below a folder, level by level, sorted; parents first."""
    level = [top] if top.is_dir() else []
    yield from level
    while level:
        below = []
        for folder in level:
            for entry in sorted(os.scandir(folder), key=lambda found: found.name):
                if entry.is_dir(follow_symlinks=False):
                    below.append(Path(entry.path))
                if entry.is_symlink() or entry.is_file() or entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path)
        level = below


def _copy_entry(source: Path, target: Path) -> None:
    """Copy one entry; of a file, at most LARGEST_COPY_BYTES."""
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir()
    else:
        with source.open("rb") as content:
            target.write_bytes(content.read(LARGEST_COPY_BYTES))
        shutil.copystat(source, target)


def _fill(folder: Path, entries: int) -> None:
    """Make up what a small machine's /usr did not give, one directory of entries."""
    if entries <= 0:
        return
    folder.mkdir()
    for number in range(entries - 1):
        (folder / f"file{number}").write_bytes(b"filler\n" * (number % 500))


def _empty_files(folder: Path, count: int, *, prefix: str = "f") -> None:
    for number in range(count):
        (folder / f"{prefix}{number:04}").touch()


def _fill_file(path: Path, size_mib: int) -> None:
    """Write a file of random bytes, one block over and over: no holes, and quick to make."""
    block = random.Random(0).randbytes(BLOCK_BYTES)
    with path.open("wb") as file:
        for _ in range(size_mib):
            file.write(block)
