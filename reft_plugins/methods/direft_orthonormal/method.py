"""DiReFT of pyreft as a method: what a unit learns, and its lowering."""

from __future__ import annotations

from reft_plugins.methods.interventions import InterventionMethod, LowRankConfig, UnitTensors
from reft_plugins.methods.interventions.edits import MakeEdit
from reft_plugins.methods.interventions.module import RotatedMap, UnitParameters
from reft_plugins.program import Edit


class OrthonormalDiReFT(InterventionMethod[LowRankConfig]):
    """`h <- h + R^T act(W h + b)`, `R` with orthonormal rows: LoReFT that adds to the subspace and replaces nothing.

    Two things are called DiReFT. This one is pyreft's `DireftIntervention`. The paper's (Wu et al. 2024,
    arXiv:2404.03592 eq. 3) has no orthonormality and is the method `direft`.

    Tensors: `layers.<layer>.<component>.<group>.{rotate,weight}` `[rank, hidden]` and `.bias` `[rank]`.
    """

    name = "direft_orthonormal"
    config = LowRankConfig
    learning_rate = 9e-4
    """As for LoReFT."""

    def unit(self, config: LowRankConfig, width: int) -> UnitParameters:
        """A rotation and a linear map."""
        return RotatedMap(width, config.rank)

    def edits(self, config: LowRankConfig, tensors: UnitTensors, edit: MakeEdit) -> tuple[Edit, ...]:
        """`down = W`, `up = R`."""
        up, down = tensors.pair("rotate", "weight")
        return (edit(down=down, up=up, bias=tensors.get("bias"), activation=config.activation, dropout=config.dropout),)
