"""The lists of expected failures are read whole, and cut both ways."""

from pathlib import Path

import pytest

from tests.suites import verdicts


@pytest.mark.parametrize("path", sorted(verdicts.LISTS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_line_of_a_list_has_a_reason(path: Path) -> None:
    assert all(len(reason) > 10 for reason in verdicts.expected_failures(path.stem).values())


def test_unlisted_failure_and_listed_pass_are_complaints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "LISTS", tmp_path)
    (tmp_path / "some.txt").write_text("# comment\n\na:1  the kernel has no such call\nb:2  same\n")
    said = verdicts.complaints("some", passed=["a:1", "c:3"], failed={"b:2": "no", "d:4": "EIO"})
    assert said == [
        "d:4 failed: EIO",
        "a:1 passed, but some.txt expects a failure: the kernel has no such call",
    ]


@pytest.mark.parametrize("text", ["a:1\n", "a:1   \n", "a:1 why\na:1 why not\n"])
def test_line_without_reason_and_double_line_are_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "LISTS", tmp_path)
    (tmp_path / "some.txt").write_text(text)
    with pytest.raises(verdicts.MalformedListError):
        verdicts.expected_failures("some")
