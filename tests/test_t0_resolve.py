"""The union rule as a table, and against a second statement of it that looks at the whole stack at once.

One letter stands for what a layer has under a name, topmost first:

    -  nothing      W  whiteout     D  directory    O  opaque directory
    F  file         M  metacopy
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.resolve import (
    ABSENT,
    DIRECTORY,
    FILE,
    METACOPY,
    OPAQUE,
    WHITEOUT,
    Fact,
    Kind,
    Verdict,
    resolve,
)

FACTS = {"-": ABSENT, "W": WHITEOUT, "D": DIRECTORY, "O": OPAQUE, "F": FILE, "M": METACOPY}
CLOSED_METACOPY = Fact(Kind.METACOPY, closes=True)

stacks = st.lists(st.sampled_from([*FACTS.values(), CLOSED_METACOPY]), max_size=8)


@dataclass(frozen=True)
class Shown:
    """What the union shows: the visible layer, the merged ones, the one with the data, the whiteout's."""

    visible: int | None = None
    merged: tuple[int, ...] = ()
    data: int | None = None
    whiteout: int | None = None


def hidden_by(layer: int) -> Shown:
    return Shown(whiteout=layer)


def file_in(layer: int, *, data: int | None) -> Shown:
    return Shown(visible=layer, data=data)


def merge_of(*layers: int) -> Shown:
    return Shown(visible=layers[0], merged=layers)


NOTHING = Shown()


def facts_of(letters: str) -> list[Fact]:
    return [FACTS[letter] for letter in letters]


def shown(verdict: Verdict) -> Shown:
    return Shown(verdict.visible, tuple(verdict.merged), verdict.data, verdict.whiteout)


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("", NOTHING),
        ("-", NOTHING),
        ("W", hidden_by(0)),
        ("D", merge_of(0)),
        ("O", merge_of(0)),
        ("F", file_in(0, data=0)),
        ("M", file_in(0, data=None)),
        # nothing above leaves what is below
        ("--", NOTHING),
        ("-W", hidden_by(1)),
        ("-D", merge_of(1)),
        ("-O", merge_of(1)),
        ("-F", file_in(1, data=1)),
        ("-M", file_in(1, data=None)),
        # a whiteout hides whatever is below
        ("W-", hidden_by(0)),
        ("WW", hidden_by(0)),
        ("WD", hidden_by(0)),
        ("WO", hidden_by(0)),
        ("WF", hidden_by(0)),
        ("WM", hidden_by(0)),
        # a directory merges with directories, and with nothing else
        ("D-", merge_of(0)),
        ("DW", merge_of(0)),
        ("DD", merge_of(0, 1)),
        ("DO", merge_of(0, 1)),
        ("DF", merge_of(0)),
        ("DM", merge_of(0)),
        # an opaque directory with nothing at all
        ("O-", merge_of(0)),
        ("OW", merge_of(0)),
        ("OD", merge_of(0)),
        ("OO", merge_of(0)),
        ("OF", merge_of(0)),
        ("OM", merge_of(0)),
        # a file stands alone
        ("F-", file_in(0, data=0)),
        ("FW", file_in(0, data=0)),
        ("FD", file_in(0, data=0)),
        ("FO", file_in(0, data=0)),
        ("FF", file_in(0, data=0)),
        ("FM", file_in(0, data=0)),
        # a metacopy takes its data from the next file, if no other thing is in between
        ("M-", file_in(0, data=None)),
        ("MW", file_in(0, data=None)),
        ("MD", file_in(0, data=None)),
        ("MO", file_in(0, data=None)),
        ("MF", file_in(0, data=1)),
        ("MM", file_in(0, data=None)),
    ],
)
def test_what_one_and_two_layers_show(letters: str, expected: Shown):
    assert shown(resolve(facts_of(letters))) == expected


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("D-D", merge_of(0, 2)),
        ("DDD", merge_of(0, 1, 2)),
        ("DOD", merge_of(0, 1)),
        ("DWD", merge_of(0)),
        ("DFD", merge_of(0)),
        ("DMD", merge_of(0)),
        ("D-F", merge_of(0)),
        ("-DD", merge_of(1, 2)),
        ("-OD", merge_of(1)),
        ("-WD", hidden_by(1)),
        ("-WF", hidden_by(1)),
        ("--W", hidden_by(2)),
        ("-FF", file_in(1, data=1)),
        ("-MF", file_in(1, data=2)),
        ("M-F", file_in(0, data=2)),
        ("MMF", file_in(0, data=2)),
        ("MFF", file_in(0, data=1)),
        ("MFM", file_in(0, data=1)),
        ("MWF", file_in(0, data=None)),
        ("MDF", file_in(0, data=None)),
        ("MOF", file_in(0, data=None)),
        ("OWD", merge_of(0)),
        ("WDF", hidden_by(0)),
        ("FWF", file_in(0, data=0)),
    ],
)
def test_what_three_layers_show(letters: str, expected: Shown):
    assert shown(resolve(facts_of(letters))) == expected


def test_metacopy_beside_a_whiteout_of_its_name_has_no_data():
    verdict = resolve([CLOSED_METACOPY, FILE])
    assert (verdict.kind, verdict.data) == (Kind.METACOPY, None)


@pytest.mark.parametrize(
    ("letters", "kind"),
    [
        ("-", Kind.ABSENT),
        ("WF", Kind.ABSENT),
        ("DD", Kind.DIRECTORY),
        ("OF", Kind.DIRECTORY),
        ("FD", Kind.FILE),
        ("MF", Kind.METACOPY),
    ],
)
def test_kind_is_that_of_the_visible_object(letters: str, kind: Kind):
    assert resolve(facts_of(letters)).kind is kind


def model(facts: list[Fact]) -> Shown:
    """The rule said backwards: cut the stack where it ends, then look at all that is left of it."""
    present = [(layer, fact) for layer, fact in enumerate(facts) if fact.kind is not Kind.ABSENT]
    if not present:
        return NOTHING
    top, first = present[0]
    if first.kind is Kind.WHITEOUT:
        return hidden_by(top)
    is_directory = first.kind is Kind.DIRECTORY
    alike = {Kind.DIRECTORY} if is_directory else {Kind.FILE, Kind.METACOPY}
    same = list(itertools.takewhile(lambda pair: pair[1].kind in alike, present))
    ends = [place for place, (_, fact) in enumerate(same) if fact.closes]
    reached = same[: ends[0] + 1] if ends else same
    if is_directory:
        return merge_of(*(layer for layer, _ in reached))
    files = [layer for layer, fact in reached if fact.kind is Kind.FILE]
    return file_in(top, data=files[0] if files else None)


@given(stacks)
def test_folding_agrees_with_looking_at_the_whole_stack(facts: list[Fact]):
    assert shown(resolve(facts)) == model(facts)


@pytest.mark.parametrize(
    "letters", ["".join(letters) for letters in itertools.product(FACTS, repeat=3)]
)
def test_every_stack_of_three_agrees_with_looking_at_the_whole(letters: str):
    assert shown(resolve(facts_of(letters))) == model(facts_of(letters))


@given(stacks, st.sampled_from([*FACTS.values(), CLOSED_METACOPY]))
def test_closed_verdict_takes_nothing_more(facts: list[Fact], below: Fact):
    verdict = resolve(facts)
    if verdict.closed:
        before = copy.deepcopy(verdict)
        assert not verdict.add(len(facts), below)
        assert verdict == before


@given(stacks)
def test_verdict_closes_as_soon_as_nothing_below_can_matter(facts: list[Fact]):
    now = model(facts)
    tails = [[below] for below in FACTS.values()]
    can_change = any(model(facts + tail) != now for tail in tails)
    assert resolve(facts).closed == (not can_change)


@given(stacks)
def test_layer_takes_part_exactly_when_it_is_shown_merged_or_gives_data(facts: list[Fact]):
    verdict = Verdict()
    took_part = [layer for layer, fact in enumerate(facts) if verdict.add(layer, fact)]
    named = {verdict.visible, verdict.data, *verdict.merged} - {None}
    in_between = {layer for layer in took_part if facts[layer].kind is Kind.METACOPY}
    assert named <= set(took_part)
    assert set(took_part) == named | in_between


@given(stacks, st.integers(0, 8))
def test_layer_with_nothing_changes_nothing_but_the_count(facts: list[Fact], at: int):
    at = min(at, len(facts))

    def lifted(layer: int | None) -> int | None:
        return layer if layer is None or layer < at else layer + 1

    without = shown(resolve(facts))
    merged = tuple(layer if layer < at else layer + 1 for layer in without.merged)
    lifted_all = Shown(
        lifted(without.visible), merged, lifted(without.data), lifted(without.whiteout)
    )
    assert shown(resolve([*facts[:at], ABSENT, *facts[at:]])) == lifted_all
