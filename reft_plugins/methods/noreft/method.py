"""NoReFT as a method: what a unit learns, and its lowering."""

from __future__ import annotations

from reft_plugins.methods.interventions import InterventionMethod, LowRankConfig, UnitTensors
from reft_plugins.methods.interventions.edits import MakeEdit, replace_in_subspace
from reft_plugins.methods.interventions.module import ProjectedMap, UnitParameters
from reft_plugins.program import Edit


class NoReFT(InterventionMethod[LowRankConfig]):
    """`h <- h + P^T (act(W h + b) - (P h + p))`: LoReFT with any matrix `P` and a bias in place of the rotation.

    The ablation of the constraint in Wu et al. 2024, arXiv:2404.03592; pyreft's `NoreftIntervention` and AdapterHub's
    `NoReftConfig`, which has no `p`.

    Tensors: `layers.<layer>.<component>.<group>.{projection,weight}` `[rank, hidden]`, `.bias` `[rank]` and, where it
    was learned, `.projection_bias` `[rank]`.
    """

    name = "noreft"
    config = LowRankConfig
    learning_rate = 9e-4
    """As for LoReFT."""

    def unit(self, config: LowRankConfig, width: int) -> UnitParameters:
        """A projection and a linear map, both with a bias."""
        return ProjectedMap(width, config.rank, projection_bias=True)

    def edits(self, config: LowRankConfig, tensors: UnitTensors, edit: MakeEdit) -> tuple[Edit, ...]:
        """`down = W - P`, `up = P`, `bias = b - p`; with an activation two edits of the same state."""
        projection, weight = tensors.pair("projection", "weight")
        return replace_in_subspace(
            config, edit, projection, weight, tensors.get("bias"), tensors.get("projection_bias")
        )
