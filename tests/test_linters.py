"""ruff and mypy as tests, so that one command judges everything."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.requirements import in_ci

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("unionfs", "layerstore", "runtime", "tools", "bench")


def run(tool: str, *arguments: str) -> None:
    program = Path(sysconfig.get_path("scripts"), tool)
    if not program.exists():
        reason = f"{tool} is not installed beside {sys.executable} (pip install -e '.[dev]')"
        (pytest.fail if in_ci() else pytest.skip)(reason)
    judged = subprocess.run(
        [program, *arguments], cwd=PROJECT, check=False, capture_output=True, text=True
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_ruff_finds_nothing():
    run("ruff", "check", "--output-format=concise", ".")


def test_ruff_would_change_no_formatting():
    run("ruff", "format", "--check", ".")


def test_mypy_finds_nothing():
    packages = [name for name in PACKAGES if (PROJECT / name / "__init__.py").exists()]
    assert "unionfs" in packages
    run("mypy", "--strict", *packages)
