"""How far the subspaces of adapters overlap: principal angles (Björck & Golub 1973, doi:10.2307/2005662)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from reft_plugins.compose.edits import disjoint
from reft_plugins.program import Edit, Program, WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

SPACES = ("writes", "reads")
"""What a node adds lies in the span of `up` and `shift`, or of the columns of `b`; what it reads, of `down` or `a`."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two adapters' subspaces in one place.

    Attributes:
        place: site or module; space: one of `SPACES`.
        first, second: names of the adapters; ranks: dimensions of their subspaces; width: of the space around them.
        angles: principal angles in degrees, ascending, as many as the smaller rank; 90 is orthogonal.
        same_tokens: whether any token can be changed by both.
    """

    place: str
    space: str
    first: str
    second: str
    ranks: tuple[int, int]
    width: int
    angles: tuple[float, ...]
    same_tokens: bool

    @property
    def shared(self) -> float:
        """Mean squared cosine of the angles: 0 for orthogonal subspaces, 1 where one holds the other."""
        return sum(math.cos(math.radians(angle)) ** 2 for angle in self.angles) / len(self.angles)

    @property
    def by_chance(self) -> float:
        """What `shared` is expected to be of random subspaces of these ranks."""
        return max(self.ranks) / self.width

    def to_json(self) -> dict[str, Any]:
        """All of it, for scripts."""
        return {**asdict(self), "shared": self.shared, "by_chance": self.by_chance}


def overlap(programs: Mapping[str, Program]) -> list[Overlap]:
    """Overlap of every two programs in every place that both change.

    Args:
        programs: by name of the adapter, see `learned_program`.

    Returns:
        one entry per pair, place and space, in the order of places.
    """
    found: list[Overlap] = []
    places = {name: _places(program) for name, program in programs.items()}
    for first, second in combinations(programs, 2):
        for place, space in [key for key in places[first] if key in places[second]]:
            one, other = places[first][place, space], places[second][place, space]
            bases = orthonormal_basis(_stack(one)), orthonormal_basis(_stack(other))
            if not all(len(basis) for basis in bases) or bases[0].shape[1] != bases[1].shape[1]:
                continue
            found.append(
                Overlap(
                    place,
                    space,
                    first,
                    second,
                    (len(bases[0]), len(bases[1])),
                    int(bases[0].shape[1]),
                    tuple(principal_angles(*bases)),
                    not all(disjoint(a.positions, b.positions) for a, _ in one for b, _ in other),
                )
            )
    return found


def principal_angles(one: Tensor, other: Tensor) -> list[float]:
    """Angles in degrees, ascending, between the spans of two sets of orthonormal rows, `[r, n]` and `[s, n]`.

    Angles below 45 degrees come from their sines, because the cosine of a small one is 1 up to rounding: in float64
    they are good to about 1e-14 degrees (section 3 of the paper).
    """
    import torch

    small, large = sorted((one, other), key=len)
    inside = small @ large.T
    cosines = torch.linalg.svdvals(inside).clamp(0, 1)
    sines = torch.linalg.svdvals(small - inside @ large).flip(0).clamp(0, 1)
    angles: list[float] = torch.rad2deg(torch.where(cosines**2 > 0.5, sines.arcsin(), cosines.arccos())).tolist()
    return angles


def orthonormal_basis(rows: Tensor) -> Tensor:
    """Orthonormal rows, float64 `[rank, n]`, that span the same space; directions within rounding of zero are none."""
    import torch

    _, values, basis = torch.linalg.svd(rows.double(), full_matrices=False)
    smallest = values.max() * max(rows.shape) * torch.finfo(torch.float32).eps
    found: Tensor = basis[values > smallest]
    return found


Part = tuple[Edit | WeightDelta, "Tensor"]


def _places(program: Program) -> dict[tuple[str, str], list[Part]]:
    """The rows that nodes contribute to each place and space."""
    places: dict[tuple[str, str], list[Part]] = {}
    for node, place, space, rows in _rows(program):
        places.setdefault((place, space), []).append((node, rows))
    return places


def _rows(program: Program) -> Iterator[tuple[Edit | WeightDelta, str, str, Tensor]]:
    for edit in program.edits:
        for space, rows in (("writes", edit.up), ("reads", edit.down)):
            if rows is not None:
                yield edit, str(edit.site), space, rows
        if edit.shift is not None:
            yield edit, str(edit.site), "writes", edit.shift[None]
    for delta in program.weight_deltas:
        if delta.a is not None and delta.b is not None:
            yield delta, delta.module, "writes", delta.b.T
            yield delta, delta.module, "reads", delta.a


def _stack(parts: Sequence[Part]) -> Tensor:
    import torch

    return torch.cat([rows.double() for _, rows in parts])
