"""LoReFT as a method: training module and lowering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from reft_plugins.errors import AdapterError
from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method
from reft_plugins.methods.loreft.config import LoReFTConfig
from reft_plugins.methods.loreft.module import LoReFTParameters
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, Site


class LoReFT(Method[LoReFTConfig]):
    """`h <- h + R^T (act(W h + b) - R h)`, `R` with orthonormal rows (Wu et al. 2024, arXiv:2404.03592 eq. 2).

    Tensors: `layers.<layer>.<component>.<group>.{rotate,weight}` `[rank, hidden]` and `.bias` `[rank]`; `group` counts
    the position groups with parameters of their own (prefix 0, suffix 1), 0 where they are shared.
    """

    name = "loreft"
    config = LoReFTConfig
    learning_rate = 9e-4
    """What pyreft's scripts use for LLaMA-7B; models of a few million parameters want about 4e-3."""

    def parameters(self, config: LoReFTConfig, base: BaseModelIdentity) -> nn.Module:
        """Fresh parameters for the layers of `config`.

        Raises:
            AdapterError: when a layer or the rank is outside the base model.
        """
        layers = range(base.num_hidden_layers) if config.layers == "all" else config.layers
        outside = [layer for layer in layers if layer >= base.num_hidden_layers]
        if outside:
            raise AdapterError(f"layers {outside} are outside the base model: {base.num_hidden_layers} layers")
        if config.rank > base.hidden_size:
            raise AdapterError(f"rank {config.rank} exceeds the base model's hidden size {base.hidden_size}")
        groups = len(_groups(config))
        units = [f"layers.{layer}.{config.component}.{group}" for layer in layers for group in range(groups)]
        return LoReFTParameters(units, base.hidden_size, config.rank)

    def lower(self, config: LoReFTConfig, tensors: Mapping[str, Tensor]) -> Program:
        """`down = W - R`, `up = R`; with an activation `act(W h + b) R` and `-R h R`, two edits of the same state."""
        groups = _groups(config)
        nodes: list[Edit] = []
        for unit, site, group in _units(tensors):
            if group >= len(groups):
                raise AdapterError(f"{unit}: positions {config.positions!r} have only {len(groups)} group(s)")
            rotate, weight, bias = tensors[f"{unit}.rotate"], tensors[f"{unit}.weight"], tensors.get(f"{unit}.bias")
            if rotate.shape != weight.shape:
                raise AdapterError(
                    f"{unit}: rotate {list(rotate.shape)} and weight {list(weight.shape)} differ in shape"
                )
            edit = partial(Edit, site, groups[group], up=rotate)
            if config.activation == "identity":
                nodes.append(edit(down=weight - rotate, bias=bias, dropout=config.dropout))
            else:
                nodes.append(edit(down=weight, bias=bias, activation=config.activation))
                nodes.append(edit(down=-rotate, simultaneous=True, dropout=config.dropout))
        return Program(tuple(nodes))


def _groups(config: LoReFTConfig) -> tuple[Positions, ...]:
    positions = Positions.parse(config.positions)
    return (positions,) if config.shared else positions.parts()


def _units(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Site, int]]:
    names = {name.rpartition(".")[0] for name in tensors}
    units = []
    for name in names:
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "layers" or not (parts[1].isdigit() and parts[3].isdigit()):
            raise AdapterError(f"tensor name {name!r} is not of the form layers.<layer>.<component>.<group>.<tensor>")
        units.append((int(parts[1]), parts[2], int(parts[3]), name))
    for layer, component, group, name in sorted(units):
        yield name, Site(layer, component), group
