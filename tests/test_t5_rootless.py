"""Without privilege: the mounted tests inside user namespaces, with the `user.` dialect.

Of the other mounted tests a part runs here, chosen so that each kind of change is in it. What cannot
be had in a user namespace is not: trusted.* attributes, devices, overlayfs with redirects (as an
oracle), other users' set-user-id bits kept by root's writes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import userns

pytestmark = [pytest.mark.root, pytest.mark.fuse]

OWN = "tests/inside_userns.py"
ORDINARY_USER = 12345

WITH_A_RANGE_OF_IDS = (
    "tests/test_t4_copyup.py::test_hard_links_stay_one_file",
    "tests/test_t4_copyup.py::test_metadata_copy_of_a_renamed_file_finds_its_data",
    "tests/test_t4_copyup.py::test_metadata_copy_of_a_hard_linked_file_gets_data_for_all_names",
    "tests/test_t4_copyup.py::test_holes_stay_holes",
    "tests/test_t4_files.py::test_shared_mapping_and_write_see_each_other",
    "tests/test_t4_files.py::test_names_of_255_bytes_work_in_every_call",
    "tests/test_t4_identity.py::test_unlinked_open_file_can_be_used",
    "tests/test_t4_identity.py::test_replaced_file_lives_on_through_its_descriptor",
    "tests/test_t4_identity.py::test_new_links_in_the_upper_are_counted",
    "tests/test_t4_layers.py::test_stack_of_layers_without_an_upper_is_read_only",
    "tests/test_t4_permissions.py::test_acl_decides_about_access",
    "tests/test_t4_permissions.py::test_umask_is_applied_once",
)


def assert_all_passed(inside: list[str], folder: Path, *chosen: str) -> None:
    done = userns.run_tests(inside, folder, *chosen)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout


def test_namespace_with_a_range_of_ids(scratch: Path) -> None:
    with userns.ranged() as inside:
        assert_all_passed(inside, scratch, OWN, *WITH_A_RANGE_OF_IDS)


def test_namespace_of_an_ordinary_user(scratch: Path) -> None:
    folder = scratch / "user"
    folder.mkdir()
    with userns.single(ORDINARY_USER, scratch) as inside:
        os.chown(folder, ORDINARY_USER, ORDINARY_USER)
        assert_all_passed(inside, folder, OWN)
