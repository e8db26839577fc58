"""What a suite said, held against the list of failures that are expected of mica.

    expected/SUITE.txt      one case a line: its name, blanks, then the reason why it fails
                            '#' starts a comment line

A listed case that passes is a fault too: the list says what is true today.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

LISTS = Path(__file__).parent / "expected"


class MalformedListError(Exception):
    """A line of a list has no reason, or names a case twice."""

    def __init__(self, path: Path, line_number: int, fault: str) -> None:
        super().__init__(f"{path}:{line_number}: {fault}")


def expected_failures(suite: str) -> dict[str, str]:
    """Return the cases of `suite` that are known to fail, each with its reason.

    Raises:
        MalformedListError: A line lacks a reason, or a case stands twice.
    """
    path = LISTS / f"{suite}.txt"
    reasons: dict[str, str] = {}
    for line_number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        case, _, reason = line.partition(" ")
        if not reason.strip():
            raise MalformedListError(path, line_number, f"no reason for {case}")
        if case in reasons:
            raise MalformedListError(path, line_number, f"{case} stands twice")
        reasons[case] = reason.strip()
    return reasons


def complaints(suite: str, *, passed: Collection[str], failed: Mapping[str, str]) -> list[str]:
    """Say, a line per case, where the outcome is not the expected one.

    Args:
        suite: Names the list.
        passed: The cases that passed.
        failed: The cases that failed, each with what the suite said.
    """
    expected = expected_failures(suite)
    lines = [f"{case} failed: {said}" for case, said in failed.items() if case not in expected]
    lines += [
        f"{case} passed, but {suite}.txt expects a failure: {expected[case]}"
        for case in passed
        if case in expected
    ]
    return lines
