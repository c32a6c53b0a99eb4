"""Cached interchanges as a method: nothing is learned, the lowering is all there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.methods import Method
from reft_plugins.methods.interchange.config import InterchangeConfig
from reft_plugins.methods.interchange.edits import interchange_edit, single_positions
from reft_plugins.methods.interventions.units import UnitTensors, units_in
from reft_plugins.program import Edit, Program

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reft_plugins.manifest import BaseModelIdentity
    from reft_plugins.methods import Trainable


class Interchange(Method[InterchangeConfig]):
    """`h <- h + R^T (mask * (R s - R h))`, `s` from a source prompt (Geiger et al. 2024, arXiv:2303.02536 eq. 3).

    Made by `reft_plugins.methods.interchange.cache.cache_source`, not trained. Tensors:
    `layers.<layer>.<component>.0.value` `[tokens, rank]`, which is `R s` at each token of `positions`, `.rotation`
    `[rank, hidden]` and `.mask` `[rank]`. Without a rotation the value is `s` `[tokens, hidden]` and takes the place
    of `h`.
    """

    name = "interchange"
    config = InterchangeConfig

    def lower(self, config: InterchangeConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One edit per site and token."""
        positions = single_positions(config.positions)
        nodes: list[Edit] = []
        for unit in units_in(tensors):
            stored = UnitTensors(unit, tensors)
            value = stored["value"]
            if len(value) != len(positions):
                raise AdapterError(f"{unit}: {len(value)} values for the {len(positions)} tokens {config.positions}")
            rotation, mask = stored.get("rotation"), stored.get("mask")
            nodes += [
                interchange_edit(unit.site, position, rotation, mask, token)
                for position, token in zip(positions, value, strict=True)
            ]
        return Program(tuple(nodes))

    def attach(self, model: nn.Module, config: InterchangeConfig, base: BaseModelIdentity) -> Trainable:
        """Refuse: the rotation is what can be learned.

        Raises:
            AdapterError: always.
        """
        raise AdapterError("method 'interchange' caches a source and learns nothing; train a rotation by method 'das'")
