"""DiReFT of the paper as a method: what a unit learns, and its lowering."""

from __future__ import annotations

from reft_plugins.methods.interventions import InterventionMethod, LowRankConfig, UnitTensors
from reft_plugins.methods.interventions.edits import MakeEdit
from reft_plugins.methods.interventions.module import ProjectedMap, UnitParameters
from reft_plugins.program import Edit


class DiReFT(InterventionMethod[LowRankConfig]):
    """`h <- h + P^T act(W h + b)` with any matrix `P` (Wu et al. 2024, arXiv:2404.03592 eq. 3).

    Two things are called DiReFT. This one is the paper's, without orthonormality: pyreft calls it
    `NodireftIntervention`, AdapterHub `DiReftConfig`. With orthonormal rows in place of `P`, which is what pyreft's
    `DireftIntervention` computes, it is the method `direft_orthonormal`.

    Tensors: `layers.<layer>.<component>.<group>.{projection,weight}` `[rank, hidden]` and `.bias` `[rank]`.
    """

    name = "direft"
    config = LowRankConfig
    learning_rate = 9e-4
    """As for LoReFT."""

    def unit(self, config: LowRankConfig, width: int) -> UnitParameters:
        """A projection without bias and a linear map."""
        return ProjectedMap(width, config.rank, projection_bias=False)

    def edits(self, config: LowRankConfig, tensors: UnitTensors, edit: MakeEdit) -> tuple[Edit, ...]:
        """`down = W`, `up = P`."""
        up, down = tensors.pair("projection", "weight")
        return (edit(down=down, up=up, bias=tensors.get("bias"), activation=config.activation, dropout=config.dropout),)
