"""Full fine-tuning as a method."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from reft_plugins.errors import AdapterError
from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, Trainable
from reft_plugins.methods._own_weights import TIED, OwnWeightsTrainable, by_places, lower_own_weights
from reft_plugins.methods.full.config import FullConfig
from reft_plugins.program import Program


class Full(Method[FullConfig]):
    """`W <- W'` for all or chosen parameters: gradient descent on the base model's own weights.

    Tensors: the learned parameters by their names in the base, in the layout of its own state. A parameter that modules
    share (tied embeddings) is stored once, as `<module>+<module>.weight`.
    """

    name = "full"
    config = FullConfig
    learning_rate = 2e-5
    """Usual for BERT-sized models and larger (Devlin et al. 2018, arXiv:1810.04805, appendix A.3)."""

    def attach(self, model: nn.Module, config: FullConfig, base: BaseModelIdentity) -> Trainable:
        """Let gradients reach the chosen parameters.

        Raises:
            AdapterError: a pattern that fits no parameter, or a chosen parameter that is neither a weight nor a bias.
        """
        every = by_places(model)
        unused = [pattern for pattern in config.parameters if not any(_fits(name, pattern) for name in every)]
        if unused:
            raise AdapterError(f"parameters {unused}: {type(model).__name__} has none of such a name")
        chosen = {name: every[name] for name in every if any(_fits(name, pattern) for pattern in config.parameters)}
        others = [name for name in chosen if name.rpartition(".")[2] not in ("weight", "bias")]
        if others:
            raise AdapterError(
                f"{type(model).__name__}: parameters that are neither weight nor bias of a module cannot be stored: "
                f"{', '.join(others)}. Choose others by parameters=[...]"
            )
        return OwnWeightsTrainable(model, chosen)

    def lower(self, config: FullConfig, tensors: Mapping[str, Tensor]) -> Program:
        """The learned parameters in the place of the base's own."""
        return lower_own_weights(tensors)


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits a parameter under one of its names."""
    modules, _, kind = name.rpartition(".")
    return any(fnmatchcase(f"{module}.{kind}", pattern) for module in modules.split(TIED))
