"""What the edits of one site add to its state, as maps that do not depend on how the parameters are written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adapters_store.comparison.norms import LinearMap, add, map_distance, norm, stack, tensor_distance
from adapters_store.comparison.results import Distance
from reft_plugins.compose.edits import disjoint
from reft_plugins.program import Edit

Form = tuple[str, str | None]
"""Activation, and the component that is read where it is another one."""
_FACTORS = ("down", "up", "bias", "scale", "shift")


@dataclass(frozen=True, slots=True, eq=False)
class AffineChange:
    """`x -> linear(x) + constant`: what is added to the state, for the state `x` that the first edit reads."""

    linear: LinearMap
    constant: Tensor | None = None

    @classmethod
    def of(cls, edits: Sequence[Edit]) -> AffineChange:
        """Of edits of one site, the same positions and the identity as activation, in program order."""
        before, after = cls(LinearMap()), cls(LinearMap())
        for edit in edits:
            if not edit.simultaneous:
                before = after
            after = after.plus(_change_by(edit, before if _source(edit) is None else cls(LinearMap())))
        return after

    def plus(self, other: AffineChange) -> AffineChange:
        """The sum of both changes."""
        one, more = self.linear, other.linear
        linear = LinearMap(stack(one.up, more.up), stack(one.down, more.down), add(one.diagonal, more.diagonal))
        return AffineChange(linear, add(self.constant, other.constant))


def compare_edits(a: Sequence[Edit], b: Sequence[Edit]) -> tuple[list[Distance], list[str]]:
    """Distances of what two programs do at one site, and what of it cannot be compared.

    Edits of the same positions, activation and source are taken together; with the identity as activation their
    factors are multiplied, so that any two ranks can be compared, and factors that only look different are not.
    """
    distances: list[Distance] = []
    notes: list[str] = []
    one, other = _by_positions(a), _by_positions(b)
    pairs = [(specification, specification) for specification in one if specification in other]
    left = [spec for spec in one if spec not in other], [spec for spec in other if spec not in one]
    if len(left[0]) == len(left[1]) == 1:
        pairs.append((left[0][0], left[1][0]))
        left = [], []
    several = len(one) > 1 or len(other) > 1
    for mine, theirs in pairs:
        label = None if not several and mine == theirs else mine if mine == theirs else f"{mine} / {theirs}"
        _compare_group(one[mine], other[theirs], label, distances, notes)
    for spec in left[0]:
        _compare_group(one[spec], (), spec, distances, notes)
    for spec in left[1]:
        _compare_group((), other[spec], spec, distances, notes)
    for side, edits in (("a", a), ("b", b)):
        if _act_in_turn(edits):
            notes.append(f"edits of {side} act on the same tokens one after another and are compared one by one")
    return distances, notes


def _compare_group(
    a: Sequence[Edit], b: Sequence[Edit], label: str | None, distances: list[Distance], notes: list[str]
) -> None:
    one, other = _by_form(a), _by_form(b)
    for form in dict.fromkeys((*one, *other)):
        mine, theirs = one.get(form, []), other.get(form, [])
        if _is_affine(form, (*mine, *theirs)):
            _compare_maps(AffineChange.of(mine), AffineChange.of(theirs), label, distances, notes)
        else:
            _compare_factors(form, mine, theirs, label, distances, notes)


def _compare_maps(
    a: AffineChange, b: AffineChange, label: str | None, distances: list[Distance], notes: list[str]
) -> None:
    shapes = {each.linear.shape for each in (a, b)} - {None}
    widths = {len(each.constant) for each in (a, b) if each.constant is not None}
    if len(shapes) > 1 or len(widths) > 1:
        notes.append("the states have different widths")
        return
    if shapes:
        distances.append(map_distance("linear", a.linear, b.linear, label))
    if widths:
        distances.append(tensor_distance("constant", a.constant, b.constant, label))


def _compare_factors(
    form: Form,
    a: Sequence[Edit],
    b: Sequence[Edit],
    label: str | None,
    distances: list[Distance],
    notes: list[str],
) -> None:
    name = form[0] if form[1] is None else f"{form[0]} of {form[1]}"
    if len(a) != len(b):
        notes.append(f"{name}: {len(a)} and {len(b)} edits with an activation have no counterparts")
        return
    for mine, theirs in zip(a, b, strict=True):
        if mine.rank != theirs.rank:
            notes.append(f"{name}: edits of ranks {mine.rank} and {theirs.rank} with an activation are no one map")
            continue
        for factor in _FACTORS:
            x, y = (_changed(factor, edit) for edit in (mine, theirs))
            if x is not None and y is not None and x.shape != y.shape:
                notes.append(f"{name}: {factor} has the shapes {list(x.shape)} and {list(y.shape)}")
            elif norm(x) or norm(y):
                distances.append(tensor_distance(f"{name} {factor}", x, y, label))


def _changed(factor: str, edit: Edit) -> Tensor | None:
    value: Tensor | None = getattr(edit, factor)
    return value.double() - 1 if factor == "scale" and value is not None else value


def _change_by(edit: Edit, before: AffineChange) -> AffineChange:
    """What one edit adds, where the state that it sees is `x + before(x)`."""
    up, down = (None if factor is None else factor.double() for factor in (edit.up, edit.down))
    diagonal = None if edit.scale is None else edit.scale.double() - 1
    constant = None if edit.shift is None else edit.shift.double()
    earlier = before.linear
    seen = down
    if up is not None and down is not None:
        bias = None if edit.bias is None else edit.bias.double()
        if before.constant is not None:
            bias = add(bias, down @ before.constant)
        if bias is not None:
            constant = add(constant, bias @ up)
        if earlier.diagonal is not None:
            seen = down + down * earlier.diagonal
        if earlier.up is not None and earlier.down is not None:
            seen = add(seen, (down @ earlier.up.T) @ earlier.down)
    change = LinearMap(up, seen, diagonal)
    if diagonal is not None:
        scaled = None if earlier.up is None else earlier.up * diagonal
        change = LinearMap(
            stack(up, scaled),
            stack(seen, earlier.down),
            diagonal if earlier.diagonal is None else diagonal + diagonal * earlier.diagonal,
        )
        if before.constant is not None:
            constant = add(constant, diagonal * before.constant)
    return AffineChange(change, constant)


def _is_affine(form: Form, edits: Sequence[Edit]) -> bool:
    """Where another component is read, a scale would mix two states, which is no map of one."""
    return form[0] == "identity" and (form[1] is None or all(edit.scale is None for edit in edits))


def _by_positions(edits: Sequence[Edit]) -> dict[str, list[Edit]]:
    found: dict[str, list[Edit]] = defaultdict(list)
    for edit in edits:
        found[str(edit.positions)].append(edit)
    return found


def _by_form(edits: Sequence[Edit]) -> dict[Form, list[Edit]]:
    found: dict[Form, list[Edit]] = defaultdict(list)
    for edit in edits:
        found["identity" if edit.down is None else edit.activation, _source(edit)].append(edit)
    return found


def _source(edit: Edit) -> str | None:
    return None if edit.reads == edit.site.component else edit.reads


def _act_in_turn(edits: Sequence[Edit]) -> bool:
    """Whether an edit reads what one of other positions or another form left, on any token."""
    for number, edit in enumerate(edits):
        if edit.simultaneous or not number:
            continue
        for earlier in edits[:number]:
            together = edit.positions == earlier.positions and _by_form([edit]).keys() == _by_form([earlier]).keys()
            if not together and not disjoint(edit.positions, earlier.positions):
                return True
    return False
