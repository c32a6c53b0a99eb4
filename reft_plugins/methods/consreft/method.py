"""ConsReFT as a method: what a unit learns, and its lowering."""

from __future__ import annotations

from reft_plugins.methods.interventions import InterventionMethod, SourceConfig, UnitTensors
from reft_plugins.methods.interventions.edits import MakeEdit
from reft_plugins.methods.interventions.module import RotatedSource, UnitParameters
from reft_plugins.program import Edit


class ConsReFT(InterventionMethod[SourceConfig]):
    """`h <- h + R^T (b - R h)`: what `h` has in the subspace of `R` becomes the constant `b`.

    LoReFT (Wu et al. 2024, arXiv:2404.03592 eq. 2) with `W = 0`; pyreft's `ConsreftIntervention`.

    Tensors: `layers.<layer>.<component>.<group>.rotate` `[rank, hidden]`, orthonormal rows, and `.source` `[rank]`.
    """

    name = "consreft"
    config = SourceConfig
    learning_rate = 2e-3
    """What pyreft uses to memorise a text with LLaMA-7B."""

    def unit(self, config: SourceConfig, width: int) -> UnitParameters:
        """A rotation and a constant."""
        return RotatedSource(width, config.rank)

    def edits(self, config: SourceConfig, tensors: UnitTensors, edit: MakeEdit) -> tuple[Edit, ...]:
        """`down = -R`, `up = R`, `bias = b`."""
        rotate = tensors["rotate"]
        return (edit(down=-rotate, up=rotate, bias=tensors["source"], dropout=config.dropout),)
