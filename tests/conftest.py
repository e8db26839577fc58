"""What every test may use: markers that know when to skip, a scratch folder, stacks of layers.

The fixtures' classes are in tests/support; a test that names `stack` needs no marker of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import requirements
from tests.support import scratch as scratch_folder

if TYPE_CHECKING:
    from tests.support.stack import Stacks

FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that mount a stack, so that they can be chosen with -m like the others."""
    for item in items:
        if "stack" in getattr(item, "fixturenames", ()):
            item.add_marker("root")
            item.add_marker("fuse")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("suite") and (reason := requirements.missing_suites()):
        pytest.skip(reason)
    requirements.require(*(need for need in requirements.NEEDS if item.get_closest_marker(need)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Remember a failure, so that what follows from it is not reported as a second one."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture
def scratch(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a real disk; a test that passes must have ended its mounts in it."""
    base = scratch_folder.find_base()
    if base is None:
        reason = f"needs a folder on a real disk: name one in {scratch_folder.VARIABLE}"
        (pytest.fail if requirements.in_ci() else pytest.skip)(reason)
    folder = scratch_folder.make(base)
    try:
        yield folder
    finally:
        left = scratch_folder.remove(folder)
    assert not left or request.node.stash.get(FAILED, False), f"the test left mounts: {left}"


@pytest.fixture
def stack(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Stacks]:
    """Makes layers and mounts them; at the test's end every mount ends and is judged."""
    # The pure tests of the lowest layers also run where the mounted part cannot be imported.
    from tests.support.stack import Stacks  # noqa: PLC0415

    stacks = Stacks(scratch)
    yield stacks
    if request.node.stash.get(FAILED, False):
        print(stacks.abandon())
        return
    faults = stacks.finish()
    assert faults == [], "\n".join(faults)
