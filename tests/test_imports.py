"""Who may import whom: the table of the architecture, and one door for what has no types."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.imports import Import, cycles, imports_of, modules_of

PROJECT = Path(__file__).resolve().parents[1]

# What the modules of a package may import from the others; a name stands for all below it.
TABLE = {
    "unionfs": (),
    "layerstore": ("unionfs",),
    "runtime": ("unionfs.client",),
    "tools": ("unionfs", "layerstore", "runtime"),
    "bench": ("unionfs", "layerstore", "runtime", "tools"),
}
# Imported in one module, or in one folder of modules, of each package.
ONE_DOOR = ("msgpack", "pyroute2", "ctypes", "pyfuse3")
SLOW_TO_IMPORT = {"trio", "pyfuse3", "pyroute2", "msgpack"}


def is_below(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def read_imports(top: Path) -> list[Import]:
    return imports_of(modules_of(top, TABLE))


def forbidden_imports(imports: list[Import]) -> list[str]:
    """Return the imports of one package by another that the table does not hold."""
    faults = []
    for found in imports:
        importer, owner = found.module.split(".")[0], found.target.split(".")[0]
        is_ours = owner in {*TABLE, "tests"} and owner != importer
        if is_ours and not any(is_below(found.target, name) for name in TABLE[importer]):
            faults.append(f"{found.module}:{found.line} imports {found.target}")
    return faults


def import_cycles(imports: list[Import]) -> list[str]:
    """Return the circles among what modules import when they are imported themselves."""
    edges = defaultdict(set)
    for found in imports:
        if found.at_import_time and found.module.split(".")[0] == found.target.split(".")[0]:
            edges[found.module].add(found.target)
    return [" -> ".join(cycle) for cycle in cycles(edges)]


def second_doors(imports: list[Import]) -> list[str]:
    """Return the libraries that a package imports in more than one place."""
    importers = defaultdict(set)
    for found in imports:
        library = found.target.split(".")[0]
        if library in ONE_DOOR:
            importers[found.module.split(".")[0], library].add(found.module)
    faults = []
    for (package, library), modules in sorted(importers.items()):
        folders = {".".join(module.split(".")[:2]) for module in modules}
        if len(folders) > 1:
            faults.append(f"{package} imports {library} in {', '.join(sorted(modules))}")
    return faults


def test_packages_import_only_what_the_table_allows():
    imports = read_imports(PROJECT)
    assert any(found.module == "unionfs.__main__" for found in imports), "the walk found nothing"
    assert forbidden_imports(imports) == []


def test_no_circles_inside_a_package():
    assert import_cycles(read_imports(PROJECT)) == []


def test_untyped_libraries_have_one_door_per_package():
    assert second_doors(read_imports(PROJECT)) == []


def test_nothing_imports_the_tests():
    assert [found for found in read_imports(PROJECT) if is_below(found.target, "tests")] == []


def test_version_is_told_without_the_slow_imports():
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "unionfs", "--version"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "unionfs" in imported, "the interpreter did not tell what it imported"
    assert {module.split(".")[0] for module in imported} & SLOW_TO_IMPORT == set()
    assert told.stdout.strip()


# The rules themselves, on small projects that break them.


@pytest.fixture
def project(tmp_path):
    def write(**sources):
        for name, source in sources.items():
            path = tmp_path / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return read_imports(tmp_path)

    return write


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("unionfs__tree", "import layerstore.index"),
        ("unionfs__tree", "def f():\n    from runtime import spec"),
        ("unionfs__tree", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tools"),
        ("layerstore__index", "import runtime.spec"),
        ("runtime__spec", "from unionfs import tree"),
        ("runtime__spec", "import unionfs"),
        ("runtime__spec", "try:\n    import layerstore\nexcept ImportError:\n    raise"),
        ("tools__cli", "import tests.support.dump"),
    ],
)
def test_forbidden_import_is_found(project, importer, source):
    imports = project(**{"unionfs__tree": "", "unionfs__client": "", importer: source})
    assert len(forbidden_imports(imports)) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("layerstore__index", "from unionfs import layer"),
        ("runtime__spec", "from unionfs import client"),
        ("runtime__spec", "from unionfs.client import mount"),
        ("tools__cli", "import unionfs.tree, layerstore.index, runtime.spec"),
        ("unionfs__tree", "import os.path"),
    ],
)
def test_allowed_import_passes(project, importer, source):
    imports = project(unionfs__client="", **{importer: source})
    assert imports
    assert forbidden_imports(imports) == []


def test_circle_is_found(project):
    imports = project(
        unionfs__a="from unionfs import b",
        unionfs__b="import unionfs.c",
        unionfs__c="from . import a",
    )
    assert import_cycles(imports) == ["unionfs.a -> unionfs.b -> unionfs.c -> unionfs.a"]


def test_import_for_types_or_inside_a_function_closes_no_circle(project):
    imports = project(
        unionfs__a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import unionfs.b",
        unionfs__b="import unionfs.a",
        unionfs__c="def f():\n    import unionfs.d",
        unionfs__d="import unionfs.c",
    )
    assert import_cycles(imports) == []


def test_second_door_is_found_and_a_folder_is_one_door(project):
    imports = project(
        unionfs__a="import ctypes",
        unionfs__b="from ctypes import util",
        runtime__net__links="import pyroute2",
        runtime__net__rules="from pyroute2.netlink import nla",
        layerstore__codec="import msgpack",
    )
    assert second_doors(imports) == ["unionfs imports ctypes in unionfs.a, unionfs.b"]
