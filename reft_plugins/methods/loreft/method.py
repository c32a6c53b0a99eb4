"""LoReFT as a method: what a unit learns, and its lowering."""

from __future__ import annotations

from reft_plugins.methods.interventions import InterventionMethod, UnitTensors
from reft_plugins.methods.interventions.edits import MakeEdit, replace_in_subspace
from reft_plugins.methods.interventions.module import RotatedMap, UnitParameters
from reft_plugins.methods.loreft.config import LoReFTConfig
from reft_plugins.program import Edit


class LoReFT(InterventionMethod[LoReFTConfig]):
    """`h <- h + R^T (act(W h + b) - R h)`, `R` with orthonormal rows (Wu et al. 2024, arXiv:2404.03592 eq. 2).

    Tensors: `layers.<layer>.<component>.<group>.{rotate,weight}` `[rank, hidden]` and `.bias` `[rank]`; `group` counts
    the position groups with parameters of their own (prefix 0, suffix 1), 0 where they are shared.
    """

    name = "loreft"
    config = LoReFTConfig
    learning_rate = 9e-4
    """What pyreft's scripts use for LLaMA-7B; models of a few million parameters want about 4e-3."""

    def unit(self, config: LoReFTConfig, width: int) -> UnitParameters:
        """A rotation and a linear map."""
        return RotatedMap(width, config.rank)

    def edits(self, config: LoReFTConfig, tensors: UnitTensors, edit: MakeEdit) -> tuple[Edit, ...]:
        """`down = W - R`, `up = R`; with an activation `act(W h + b) R` and `-R h R`, two edits of the same state."""
        rotate, weight = tensors.pair("rotate", "weight")
        return replace_in_subspace(config, edit, rotate, weight, tensors.get("bias"), None)
