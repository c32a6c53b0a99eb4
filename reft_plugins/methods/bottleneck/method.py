"""Bottleneck adapters as a method: training module and lowering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from torch import Tensor, nn

from reft_plugins.errors import AdapterError
from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method
from reft_plugins.methods.bottleneck.config import BottleneckConfig, Component
from reft_plugins.methods.bottleneck.module import BottleneckParameters
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, Site


class Bottleneck(Method[BottleneckConfig]):
    """`h <- h + s (U act(D x + d) + u)` at one or two components of each layer.

    Houlsby et al. 2019 (arXiv:1902.00751, section 2.1), Pfeiffer et al. 2020 (arXiv:2005.00247) and the parallel
    adapter of He et al. 2021 (arXiv:2110.04366, table 1); see `BottleneckConfig.placement` for `h` and `x`.

    Tensors: `layers.<layer>.<component>.{down,up}` `[size, hidden]` (`down` is `D`, `up` the transpose of `U`),
    `.down_bias` `[size]`, `.up_bias` `[hidden]`, both optional, and a learned `.scaling` `[1]` or `[hidden]`;
    `<component>` is the one that is written.
    """

    name = "bottleneck"
    config = BottleneckConfig
    learning_rate = 1e-4
    """AdapterHub's recommendation for BERT-sized models; models of a few million parameters want about 5e-3."""

    def parameters(self, config: BottleneckConfig, base: BaseModelIdentity) -> nn.Module:
        """Fresh parameters for the layers of `config`; they do nothing yet.

        Raises:
            AdapterError: when a layer or the size is outside the base model.
        """
        layers = range(base.num_hidden_layers) if config.layers == "all" else config.layers
        outside = [layer for layer in layers if layer >= base.num_hidden_layers]
        if outside:
            raise AdapterError(f"layers {outside} are outside the base model: {base.num_hidden_layers} layers")
        size = config.size(base.hidden_size)
        if size > base.hidden_size:
            raise AdapterError(f"bottleneck_size {size} exceeds the base model's hidden size {base.hidden_size}")
        units = [f"layers.{layer}.{component}" for layer in layers for component in config.sites]
        learned = config.scaling if isinstance(config.scaling, str) else None
        return BottleneckParameters(units, base.hidden_size, size, learned)

    def lower(self, config: BottleneckConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One `Edit` per unit: the scaling is folded into `up`, the output's bias becomes `shift`."""
        positions = Positions.parse(config.positions)
        nodes = []
        for unit, site in _units(config, tensors):
            scaling = _scaling(config, unit, tensors)
            shift = tensors.get(f"{unit}.up_bias")
            reads = dict(config.sites)[site.component]  # type: ignore[index]
            nodes.append(
                Edit(
                    site=site,
                    positions=positions,
                    down=tensors[f"{unit}.down"],
                    up=tensors[f"{unit}.up"] * scaling,
                    bias=tensors.get(f"{unit}.down_bias"),
                    shift=None if shift is None else shift * scaling,
                    activation=config.activation,
                    reads=None if reads == site.component else reads,
                )
            )
        return Program(tuple(nodes))


def _scaling(config: BottleneckConfig, unit: str, tensors: Mapping[str, Tensor]) -> Tensor | float:
    name = f"{unit}.scaling"
    if isinstance(config.scaling, str):
        return tensors[name]
    if name in tensors:
        raise AdapterError(f"{name}: scaling is {config.scaling:g}, not 'learned' or 'channel', so none is expected")
    return config.scaling


def _units(config: BottleneckConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Site]]:
    order = get_args(Component)
    units = []
    for name in {name.rpartition(".")[0] for name in tensors}:
        parts = name.split(".")
        if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdigit():
            raise AdapterError(f"tensor name {name!r} is not of the form layers.<layer>.<component>.<tensor>")
        if parts[2] not in config.sites:
            raise AdapterError(f"{name}: placement {config.placement!r} writes {', '.join(config.sites)} only")
        units.append((int(parts[1]), order.index(parts[2]), name))
    for layer, place, name in sorted(units):
        yield name, Site(layer, order[place])
