"""CPython's own tests with their scratch files on a mount: the everyday calls of everyday programs.

The tests come with the interpreter (Debian: libpython3.11-testsuite).
"""

import importlib.util
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.suites.conftest import run_to_the_end
from tests.suites.verdicts import complaints

pytestmark = [pytest.mark.suite, pytest.mark.root, pytest.mark.fuse]

_NAMES = """
test_os test_posix test_posixpath test_genericpath test_stat test_pathlib test_glob test_shutil
test_filecmp test_fileinput test_tempfile test_file test_fileio test_io test_largefile test_mmap
test_fcntl test_tarfile test_zipfile test_zipapp test_gzip test_bz2 test_lzma test_mailbox
test_dbm test_dbm_dumb test_dbm_gnu test_dbm_ndbm test_shelve test_sqlite3 test_py_compile
test_compileall test_zipimport test_import test_unicode_file test_unicode_file_functions
test_sax test_netrc test_configparser test_fnmatch test_linecache
"""
MODULES = _NAMES.split()
MODULE_TIMEOUT_S = 600


@pytest.mark.parametrize("module", MODULES)
def test_cpython(module: str, merged: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("test") is None or importlib.util.find_spec("test.test_os") is None:
        pytest.skip("this Python comes without its tests (Debian: libpython3.11-testsuite)")
    place = merged / module
    place.mkdir()
    report = tmp_path / "report.xml"
    argv = [sys.executable, "-m", "test", "--tempdir", str(place), "--junit-xml", str(report)]
    environment = {**os.environ, "TMPDIR": str(place)}
    done = run_to_the_end([*argv, module], cwd=place, timeout_s=MODULE_TIMEOUT_S, env=environment)
    if not report.exists() and "skipped -- No module named" in done.stdout:
        pytest.skip(f"{module}: this Python was built without the module")
    assert report.exists(), done.stdout[-3000:]
    passed: list[str] = []
    failed: dict[str, str] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = case.get("name", "?").replace(" ", "_")
        said = [part.text or "" for part in case if part.tag in {"failure", "error"}]
        if said:
            failed[name] = said[0][-1500:]
        elif case.get("status") == "run" and case.get("result") == "completed":
            passed.append(name)
    if not passed and not failed:
        pytest.skip(f"{module}: {done.stdout.strip().splitlines()[-1]}")
    if done.returncode != 0 and not failed:
        failed[module] = done.stdout[-3000:]
    print(f"{module}: passed {len(passed)} failed {len(failed)}")
    assert complaints("cpython", passed=passed, failed=failed) == []
