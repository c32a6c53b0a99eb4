"""Edits in front of the norm that ends a sub-layer, where no component is, as changes of its last projection."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.formats.interventions import Intervention, lowered
from reft_plugins.program import Edit, WeightDelta

if TYPE_CHECKING:
    from reft_plugins.base_model import BaseModel

_MODULES = {"attention_output": "self_attn.o_proj", "mlp_output": "mlp.down_proj"}


def through_projections(
    units: Sequence[Intervention], activation: str, base: BaseModel | None, where: str
) -> list[WeightDelta]:
    """With `y = W x` the affine edit `y + (D y + b) U + s` is `(W + U^T D W) x + U^T b + s`, at the same positions.

    Raises:
        AdapterError: when an activation makes the edit something else, or edits of one module follow one another.
    """
    assert base is not None, "which places have such a norm is known from the base"
    for one, other in combinations(units, 2):
        disjoint = one.positions.cap_half and bool(one.positions.first) != bool(other.positions.first)
        if (one.layer, one.component) == (other.layer, other.component) and not disjoint:
            raise AdapterError(
                f"{where}: {one.component} of layer {one.layer} is edited twice in front of its norm, at positions "
                f"{one.positions} and {other.positions}, which can overlap; that cannot be expressed"
            )
    return [_delta(unit, activation, base, where) for unit in units]


def _delta(unit: Intervention, activation: str, base: BaseModel, where: str) -> WeightDelta:
    edits = [node for node in lowered(unit, activation) if isinstance(node, Edit)]
    if len(edits) != 1 or edits[0].activation != "identity":
        raise AdapterError(
            f"{where}: {unit.component} of layer {unit.layer} is edited in front of its norm with activation "
            f"{activation}, which cannot be expressed; without an activation it can"
        )
    edit, module = edits[0], f"model.layers.{unit.layer}.{_MODULES[unit.component]}"
    bias = edit.shift
    if edit.down is None or edit.up is None:
        return WeightDelta(module, bias=bias, positions=unit.positions)
    weight = base.tensor(f"{module}.weight").float()
    low = edit.bias
    if base.has(f"{module}.bias"):
        own = edit.down @ base.tensor(f"{module}.bias").float()
        low = own if low is None else low + own
    if low is not None:
        bias = low @ edit.up if bias is None else bias + low @ edit.up
    return WeightDelta(module, a=edit.down @ weight, b=edit.up.T.contiguous(), bias=bias, positions=unit.positions)
