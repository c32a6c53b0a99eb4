"""Kinds of intervention, and the layouts of tensors they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.formats.orthogonal import orthogonal_weight

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {
    "LoreftIntervention": "loreft",
    "SubloreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "DireftIntervention": "direft_orthonormal",
    "NodireftIntervention": "direft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
    "ConditionedSourceLowRankRotatedSpaceIntervention": "loreft",
    "LearnedSourceLowRankRotatedSpaceIntervention": "consreft",
}
"""Our method by pyreft's class, the last two from before its first release. What pyreft calls DiReFT has orthonormal
rows; the paper's is its NodiReFT."""

SUBSPACE_TYPE = "SubloreftIntervention"
"""The class of pyreft's examples that applies some rows of its subspace, which the caller names on every pass."""

_SIZES = {"embed_dim", "interchange_dim"}
_PARAMETRISED = {"rotate_layer.parametrizations.weight.original", "rotate_layer.parametrizations.weight.0.base"}

Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How tensors are stored, which kinds are stored so, and how to read them."""

    needed: frozenset[str]
    optional: frozenset[str]
    methods: tuple[str, ...]
    read: Callable[[Tensors, str], dict[str, Tensor]]


def _effective(raw: Tensors, where: str) -> dict[str, Tensor]:
    return _conditioned(raw["rotate_layer"], raw["weight"], raw.get("bias"), where)


def _parametrised(raw: Tensors, where: str) -> dict[str, Tensor]:
    return _conditioned(_rotation(raw, where), raw["learned_source.weight"], raw.get("learned_source.bias"), where)


def _constant(raw: Tensors, where: str) -> dict[str, Tensor]:
    rotate, source = _rotation(raw, where), raw["learned_source"].float()
    _fits(where, "learned_source", source, [rotate.shape[1]])
    return {"rotate": rotate.T.contiguous(), "source": source}


def _projected(raw: Tensors, where: str) -> dict[str, Tensor]:
    projection, weight = raw["proj_layer.weight"].float(), raw["learned_source.weight"].float()
    if projection.ndim != 2:
        raise AdapterError(f"{where}: proj_layer.weight has shape {list(projection.shape)}, expected [rank, hidden]")
    _fits(where, "learned_source.weight", weight, list(projection.shape))
    found = {"projection": projection, "weight": weight}
    for ours, theirs in (("bias", "learned_source.bias"), ("projection_bias", "proj_layer.bias")):
        if theirs in raw:
            found[ours] = raw[theirs].float()
            _fits(where, theirs, found[ours], [len(weight)])
    return found


_ROTATE_AND_SOURCE = _PARAMETRISED | {"learned_source.weight"}
LAYOUTS = (
    Layout(frozenset({"weight", "rotate_layer"}), frozenset({"bias"}), ("loreft",), _effective),
    Layout(
        frozenset(_ROTATE_AND_SOURCE),
        frozenset({"learned_source.bias"}),
        ("direft_orthonormal", "loreft"),
        _parametrised,
    ),
    Layout(frozenset(_PARAMETRISED | {"learned_source"}), frozenset(), ("consreft", "lobireft"), _constant),
    Layout(
        frozenset({"proj_layer.weight", "learned_source.weight"}),
        frozenset({"learned_source.bias", "proj_layer.bias"}),
        ("noreft", "direft"),
        _projected,
    ),
)
"""LoReFT stores its rotation as it is since pyreft 0.0.5, and in pieces, as DiReFT still does, before that."""


def layout_of(raw: Tensors, where: str) -> Layout:
    """The layout whose tensors these are.

    Raises:
        AdapterError: listing what was found.
    """
    names = set(raw) - _SIZES
    for layout in LAYOUTS:
        if layout.needed <= names <= layout.needed | layout.optional:
            return layout
    raise AdapterError(
        f"{where}: tensors {', '.join(sorted(raw)) or 'none'} are not those of an intervention of pyreft. Known are "
        + "; ".join(", ".join(sorted(layout.needed)) for layout in LAYOUTS)
    )


def method_of(layout: Layout, type_: str | None, kind: str | None, where: str) -> str:
    """The method that a layout means, by the type in the configuration, by the user's `kind`, or because it is alone.

    Raises:
        AdapterError: when none of them decides, or they contradict the tensors.
    """
    named = type_ if kind is None else kind
    if named is None:
        if len(layout.methods) == 1:
            return layout.methods[0]
        raise AdapterError(
            f"{where}: {' and '.join(layout.methods)} store the same tensors, and there is no config.json that says "
            f"which this is: give kind='{layout.methods[0]}' or kind='{layout.methods[1]}'"
        )
    candidates = _methods_named(named)
    if not candidates:
        known = ", ".join(TYPES if kind is None else sorted(set(TYPES.values())))
        hint = f"; if it computes what one of these does, say so: kind='{layout.methods[0]}'" if kind is None else ""
        raise AdapterError(f"{where}: interventions of type {named} are not read; known are {known}{hint}")
    method = next((candidate for candidate in candidates if candidate in layout.methods), None)
    if kind is not None and type_ in TYPES and TYPES[type_] != method:
        raise AdapterError(f"{where}: kind={kind!r} contradicts config.json, which says {type_}")
    if method is None:
        raise AdapterError(f"{where}: the tensors are those of {' or '.join(layout.methods)}, not those of a {named}")
    return method


def _methods_named(name: str) -> tuple[str, ...]:
    """Methods meant by a class of pyreft, by its name without `Intervention`, or by a name of ours."""
    by_class = {type_.lower(): method for type_, method in TYPES.items()}
    lowered = name.lower()
    named = by_class.get(lowered, by_class.get(f"{lowered}intervention"))
    if lowered == "direft":
        return "direft_orthonormal", "direft"
    return (named,) if named else (lowered,) if lowered in TYPES.values() else ()


def _rotation(raw: Tensors, where: str) -> Tensor:
    """`R` `[hidden, rank]`; never the stored `original`, which is not orthonormal."""
    original, base = (raw[f"rotate_layer.parametrizations.weight.{name}"] for name in ("original", "0.base"))
    return orthogonal_weight(original, base, where)


def _conditioned(rotate: Tensor, weight: Tensor, bias: Tensor | None, where: str) -> dict[str, Tensor]:
    weight, rotate = weight.float(), rotate.float()
    if weight.ndim != 2 or rotate.shape != weight.shape[::-1]:
        raise AdapterError(
            f"{where}: weight {list(weight.shape)} and rotate_layer {list(rotate.shape)} must be [rank, hidden] and "
            "[hidden, rank]"
        )
    found = {"rotate": rotate.T.contiguous(), "weight": weight}
    if bias is not None:
        found["bias"] = bias.float()
        _fits(where, "bias", found["bias"], [len(weight)])
    return found


def _fits(where: str, name: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise AdapterError(f"{where}: {name} has shape {list(tensor.shape)}, expected {shape}")
