"""Steering as a method: how vectors are found, and their lowering."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.methods.interventions import InterventionMethod, UnitTensors
from reft_plugins.methods.interventions.edits import MakeEdit
from reft_plugins.methods.steering.config import SteeringConfig
from reft_plugins.positions import Positions
from reft_plugins.program import Edit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reft_plugins.manifest import BaseModelIdentity
    from reft_plugins.methods import Trainable
    from reft_plugins.methods.interventions.module import UnitParameters
    from reft_plugins.training.data import Examples


class Steering(InterventionMethod[SteeringConfig]):
    """`h <- h + coefficient * v`, one vector per layer.

    `v` is learned by gradient (Subramani et al. 2022, arXiv:2205.05124), or the difference of means of activations
    over contrast pairs (contrastive activation addition, Rimsky et al. 2024, arXiv:2312.06681 eq. 1).

    Tensors: `layers.<layer>.<component>.<group>.vector` `[hidden]`.
    """

    name = "steering"
    config = SteeringConfig
    learning_rate = 1e-2

    def unit(self, config: SteeringConfig, width: int) -> UnitParameters:
        """A vector."""
        from reft_plugins.methods.steering.module import SteeringVector

        return SteeringVector(width)

    def edits(self, config: SteeringConfig, tensors: UnitTensors, edit: MakeEdit) -> tuple[Edit, ...]:
        """One constant shift."""
        return (edit(shift=config.coefficient * tensors["vector"], dropout=config.dropout),)

    def attach(self, model: nn.Module, config: SteeringConfig, base: BaseModelIdentity) -> Trainable:
        """Learned by gradients through the program, or computed from what pairs of texts have at the sites."""
        if config.fit == "gradient":
            return super().attach(model, config, base)
        from reft_plugins.methods.steering.module import DifferenceOfMeans

        parameters = self.parameters_on(model, config, base)
        trainable: Trainable = DifferenceOfMeans(model, parameters, Positions.parse(config.read_positions))
        return trainable

    def examples(self, config: SteeringConfig, path: str | Path, tokenizer: Any, max_length: int) -> Examples:
        """Prompts and completions, or contrast pairs.

        Raises:
            DataError: naming file and line.
        """
        if config.fit == "gradient":
            return super().examples(config, path, tokenizer, max_length)
        from reft_plugins.methods.steering.pairs import read_pairs

        return read_pairs(path, tokenizer, max_length, Positions.parse(config.read_positions))

    def collator(self, config: SteeringConfig, fill: int, left: bool) -> Callable[[Any], dict[str, Tensor]]:
        """Pads examples, or both texts of every pair."""
        if config.fit == "gradient":
            return super().collator(config, fill, left)
        from reft_plugins.methods.steering.pairs import PairCollator
        from reft_plugins.training.batches import Collator

        return PairCollator(Collator(fill=fill, left=left))
