"""RED as a method: settings, training module and lowering."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reft_plugins.methods.interventions import InterventionConfig, InterventionMethod, UnitTensors
from reft_plugins.methods.interventions.config import Components, PositionsSpec
from reft_plugins.methods.interventions.edits import MakeEdit
from reft_plugins.methods.interventions.module import UnitParameters
from reft_plugins.program import Edit


class REDConfig(InterventionConfig):
    """Those of every intervention; by default all tokens of the MLP's output, as in the paper."""

    positions: PositionsSpec = "all"
    component: Components = "mlp_output"


class ScaleAndShift(UnitParameters):
    """One factor and one summand per element; the identity to begin with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def tensors(self) -> dict[str, Tensor]:
        """`scale` and `shift` `[width]`."""
        return {"scale": self.scale, "shift": self.shift}


class RED(InterventionMethod[REDConfig]):
    """`h <- l_scaling * h + l_bias`, element by element (Wu et al. 2024, arXiv:2402.15179, "representation editing").

    Tensors: `layers.<layer>.<component>.<group>.{scale,shift}` `[hidden]`.
    """

    name = "red"
    config = REDConfig
    learning_rate = 1e-3

    def unit(self, config: REDConfig, width: int) -> UnitParameters:
        """A scale and a shift."""
        return ScaleAndShift(width)

    def edits(self, config: REDConfig, tensors: UnitTensors, edit: MakeEdit) -> tuple[Edit, ...]:
        """One edit without a low-rank part."""
        scale, shift = tensors.pair("scale", "shift")
        return (edit(scale=scale, shift=shift, dropout=config.dropout),)
