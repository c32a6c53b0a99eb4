"""ReFT adapters of AdapterHub: LoReFT, NoReFT and DiReFT after decoder layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.formats.activation_names import activation_of
from reft_plugins.formats.adapterhub.files import Checkpoint
from reft_plugins.formats.adapterhub.variant import VARIANTS, named_variant
from reft_plugins.formats.interventions import Intervention
from reft_plugins.formats.orthogonal import orthogonal_weight
from reft_plugins.positions import Positions

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(r"(?:.*\.)?(\d+)\.reft_layer\.refts\.[^.]+\.units\.(\d+)\.(.+)")
_PIECES = ("projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base")
_SUFFIX_WINS = "where prefix and suffix overlap in a short prompt, the suffix's edit counts"


def positions_of(checkpoint: Checkpoint) -> tuple[dict[int, Positions], Positions | None]:
    """Positions of each unit that is applied, and all of them as one specification where that says the same.

    Both units read the state before any of them changed it, and where prefix and suffix overlap the suffix's result
    stands; so the prefix ends where the suffix begins.

    Raises:
        AdapterError: when neither has any.
    """
    config = checkpoint.config
    first, last = int(config.get("prefix_positions", 3)), int(config.get("suffix_positions", 0))
    specs = [f"{letter}{size}" for letter, size in (("f", first), ("l", last)) if size]
    if not specs:
        raise AdapterError(f"{checkpoint.config_file}: prefix_positions and suffix_positions are 0: nothing is edited")
    together = Positions.parse("+".join(specs))
    if config.get("tied_weights"):
        return {0: together}, together
    if not (first and last):
        return {0 if first else 1: together}, together
    return {0: Positions.parse(f"f{first};trim={last}"), 1: Positions.parse(f"l{last}")}, None


def interventions_of(
    checkpoint: Checkpoint, variant: str | None
) -> tuple[list[Intervention], Positions | None, list[str]]:
    """The interventions, their positions as one specification or None, and what was assumed about them.

    Raises:
        AdapterError: when the file is not understood, or does not say whether it is NoReFT or DiReFT.
    """
    units: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        found = units.setdefault((int(match[1]), int(match[2])), {})
        if match[3] in found:
            raise AdapterError(f"{checkpoint.file}: two tensors {name!r} for one layer: encoder-decoders are not read")
        found[match[3]] = tensor
    if not units:
        raise AdapterError(f"{checkpoint.file}: no tensors of ReFT (reft_layer.refts) in it")
    places, together = positions_of(checkpoint)
    orthogonal = any(_PIECES[0] in found for found in units.values())
    method, assumed = _method(checkpoint, orthogonal, variant)
    if together is None:
        assumed.append(_SUFFIX_WINS)
    return (
        [
            _intervention(checkpoint, method, layer, unit, places, found)
            for (layer, unit), found in sorted(units.items())
            if unit in places
        ],
        together,
        assumed,
    )


def _method(checkpoint: Checkpoint, orthogonal: bool, variant: str | None) -> tuple[str, list[str]]:
    if variant is not None:
        if variant not in VARIANTS:
            raise AdapterError(f"option 'variant': {variant!r} is neither {' nor '.join(VARIANTS)}")
        if orthogonal:
            raise AdapterError(
                f"{checkpoint.file}: its projections are orthonormal, so this is a LoReFT, which has no variant"
            )
        return variant, []
    if orthogonal:
        return "loreft", []
    found = named_variant(checkpoint.document.get("name"), checkpoint.directory)
    if found is None:
        raise AdapterError(
            f"{checkpoint.directory}: AdapterHub saves NoReFT and DiReFT alike (subtract_projection is not written), "
            "so the file does not say which this is. Give variant='noreft' or variant='direft' "
            "(command line: --option variant=direft), whichever configuration it was trained with"
        )
    return found[0], [
        f"variant {found[0]}, because it is called {found[1]!r}: AdapterHub does not store which one it is. "
        "If that is wrong, give the option variant"
    ]


def _intervention(
    checkpoint: Checkpoint,
    method: str,
    layer: int,
    unit: int,
    places: Mapping[int, Positions],
    raw: Mapping[str, Tensor],
) -> Intervention:
    where = f"{checkpoint.file}: layer {layer}, unit {unit}"
    if all(name in raw for name in _PIECES):
        projection = orthogonal_weight(raw[_PIECES[0]], raw[_PIECES[1]], where)
    elif "projection.weight" in raw:
        projection = raw["projection.weight"].float()
    else:
        raise AdapterError(f"{where}: no projection among {', '.join(sorted(raw))}")
    weight, bias = raw.get("learned_source.weight"), raw.get("learned_source.bias")
    if weight is None or weight.ndim != 2 or weight.shape != projection.shape:
        shape = None if weight is None else list(weight.shape)
        raise AdapterError(
            f"{where}: learned_source.weight has shape {shape}, the projection {list(projection.shape)}: both must be "
            "[rank, hidden]"
        )
    tensors = {"rotate" if method == "loreft" else "projection": projection, "weight": weight.float()}
    if bias is not None:
        tensors["bias"] = bias.float()
    group = sorted(places).index(unit)
    return Intervention(method, layer, "block_output", group, places[unit], tensors)


def activation(checkpoint: Checkpoint) -> str:
    """Our name of its non-linearity."""
    return activation_of(checkpoint.config.get("non_linearity"), str(checkpoint.config_file))
