"""THE union rule: what one name shows, given what each layer has under it.

Everything else in the package asks this file; it touches no disk.  The facts come one per layer, topmost first,
and the fold stops asking as soon as nothing further down can matter.

Source: Linux Documentation/filesystems/overlayfs.rst, "Upper and Lower", "whiteouts and opaque directories",
"Metadata only copy up"; AUFS manual, "Branch Syntax" (`.wh.` files); OCI image-spec layer.md, "Whiteouts".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """What a layer has under a name."""

    ABSENT = "nothing"
    WHITEOUT = "a whiteout: the name is hidden from here down"
    DIRECTORY = "a directory"
    FILE = "anything else, with its contents"
    METACOPY = "the metadata of a regular file whose data lies further down"


@dataclass(frozen=True, slots=True)
class Fact:
    """What one layer says about one name.

    Attributes:
        kind: What is there.
        closes: Nothing further down shows through (an opaque directory, or a `.wh.NAME` beside NAME).
    """

    kind: Kind
    closes: bool = False


ABSENT = Fact(Kind.ABSENT)
WHITEOUT = Fact(Kind.WHITEOUT, closes=True)
DIRECTORY = Fact(Kind.DIRECTORY)
OPAQUE = Fact(Kind.DIRECTORY, closes=True)
FILE = Fact(Kind.FILE, closes=True)
METACOPY = Fact(Kind.METACOPY)


@dataclass(slots=True)
class Verdict:
    """What the union shows under the name.

    Attributes:
        visible: Index of the layer whose object is seen; None when the name is absent or hidden.
        kind: What is seen there (ABSENT when nothing is).
        merged: For a directory, the layers whose directories are merged, topmost first.
        data: For anything but a directory, the layer that holds the contents; None for a metacopy without data.
        whiteout: The layer whose whiteout hid the name, when nothing above showed it.
        closed: No fact from further down can change this verdict.
    """

    visible: int | None = None
    kind: Kind = Kind.ABSENT
    merged: list[int] = field(default_factory=list)
    data: int | None = None
    whiteout: int | None = None
    closed: bool = False

    def add(self, layer: int, fact: Fact) -> bool:
        """Take the fact of the next layer down.

        Returns:
            Whether the layer takes part: it shows the name, is merged into it or holds its data.
        """
        if self.closed or fact.kind is Kind.ABSENT:
            return False
        taken = self._take(layer, fact)
        if fact.closes or not taken:
            self.closed = True
        return taken

    def _take(self, layer: int, fact: Fact) -> bool:
        """Fold one present fact in; False when it ends the name (a whiteout, or a clash of types)."""
        if fact.kind is Kind.WHITEOUT:
            if self.visible is None:
                self.whiteout = layer
            return False
        if self.visible is None:
            self.visible, self.kind = layer, fact.kind
        elif (self.kind is Kind.DIRECTORY) != (fact.kind is Kind.DIRECTORY):
            return False
        if fact.kind is Kind.DIRECTORY:
            self.merged.append(layer)
        elif fact.kind is Kind.FILE:
            self.data = layer
        return True


def resolve(facts: list[Fact]) -> Verdict:
    """Fold the facts of all layers, topmost first, into a verdict."""
    verdict = Verdict()
    for layer, fact in enumerate(facts):
        verdict.add(layer, fact)
        if verdict.closed:
            break
    return verdict
