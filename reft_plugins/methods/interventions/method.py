"""The method that all interventions are: learned units, each lowered to one or two edits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from reft_plugins.errors import AdapterError
from reft_plugins.methods import Method
from reft_plugins.methods.interventions.config import InterventionConfig
from reft_plugins.methods.interventions.edits import MakeEdit
from reft_plugins.methods.interventions.units import UnitTensors, units_in, units_of
from reft_plugins.program import Edit, Program, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reft_plugins.manifest import BaseModelIdentity
    from reft_plugins.methods import Trainable
    from reft_plugins.methods.interventions.module import InterventionParameters, UnitParameters

ConfigT = TypeVar("ConfigT", bound=InterventionConfig)
INSIDE_SUBLAYERS = ("attention_value_output", "mlp_activation")
"""Components that need not be as wide as the residual stream."""


class InterventionMethod(Method[ConfigT]):
    """A method that says what one unit learns, and which edits that makes."""

    @abstractmethod
    def unit(self, config: ConfigT, width: int) -> UnitParameters:
        """Fresh parameters of one unit on a representation of `width` elements."""

    @abstractmethod
    def edits(self, config: ConfigT, tensors: UnitTensors, edit: MakeEdit) -> tuple[Edit, ...]:
        """The edits of one unit, in order."""

    def parameters(self, config: ConfigT, base: BaseModelIdentity) -> nn.Module:
        """Fresh parameters for the layers of `config`, on components as wide as the residual stream.

        Raises:
            AdapterError: when a layer or the rank is outside the base model.
        """
        return self._fresh(config, base, {})

    def parameters_on(self, model: nn.Module, config: ConfigT, base: BaseModelIdentity) -> InterventionParameters:
        """Fresh parameters for any components of a loaded model; what is inside a sub-layer has a width of its own.

        Raises:
            AdapterError: when a layer or the rank is outside the base model.
            UnsupportedProgramError: when the model has no such component.
        """
        from reft_plugins.methods.interventions.widths import measure

        inside = [unit.site for unit in units_of(config, base) if unit.component in INSIDE_SUBLAYERS]
        return self._fresh(config, base, measure(model, inside))

    def attach(self, model: nn.Module, config: ConfigT, base: BaseModelIdentity) -> Trainable:
        """Learned by gradients through the method's own program."""
        from reft_plugins.training.attach import ProgramTrainable

        return ProgramTrainable(self, model, config, base, self.parameters_on(model, config, base))

    def _fresh(self, config: ConfigT, base: BaseModelIdentity, widths: Mapping[Site, int]) -> InterventionParameters:
        from reft_plugins.methods.interventions.module import InterventionParameters

        units = units_of(config, base)
        return InterventionParameters(
            (unit, self.unit(config, widths.get(unit.site, base.hidden_size))) for unit in units
        )

    def lower(self, config: ConfigT, tensors: Mapping[str, Tensor]) -> Program:
        """The edits of all units by layer, component and group, so that a suffix reads what the prefix wrote."""
        groups = config.groups
        nodes: list[Edit] = []
        for unit in units_in(tensors):
            if unit.group >= len(groups):
                raise AdapterError(f"{unit}: positions {config.positions!r} have only {len(groups)} group(s)")
            edit = partial(Edit, unit.site, groups[unit.group])
            nodes.extend(self.edits(config, UnitTensors(unit, tensors), edit))
        return Program(tuple(nodes))
