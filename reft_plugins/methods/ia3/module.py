"""IA3 attached to a base model by PEFT."""

from __future__ import annotations

from torch import Tensor, nn

from reft_plugins.errors import AdapterError
from reft_plugins.methods._peft import ADAPTER
from reft_plugins.methods._weights import PeftTrainable, peft_config, peft_targets, transposed
from reft_plugins.methods.ia3.config import IA3Config


class PeftIA3(PeftTrainable):
    """A base model with PEFT's IA3 on it; see `PeftTrainable`."""

    def __init__(self, model: nn.Module, config: IA3Config) -> None:
        targets, feedforward = _targets(model, config)
        settings = peft_config(
            "IA3",
            "IA3Config",
            target_modules=peft_targets(model, config.model_copy(update={"target_modules": targets})),
            feedforward_modules=feedforward,
            modules_to_save=list(config.modules_to_save) or None,
            fan_in_fan_out=transposed(model),
            task_type="CAUSAL_LM",
        )
        super().__init__("IA3", model, settings)

    def tensors(self) -> dict[str, Tensor]:
        """`<module>.input_scale` `[in]` of feed-forward modules, `<module>.output_scale` `[out]` of the others."""
        from peft.tuners.ia3 import IA3Layer

        found = {
            f"{name}.{'input' if layer.is_feedforward else 'output'}_scale": layer.ia3_l[ADAPTER].flatten()
            for name, layer in self.tuned(IA3Layer).items()
        }
        return found | self.replaced()


def _targets(model: nn.Module, config: IA3Config) -> tuple[str | tuple[str, ...], str | list[str]]:
    if config.target_modules is not None and config.feedforward_modules is not None:
        inside = config.feedforward_modules
        return config.target_modules, inside if isinstance(inside, str) else list(inside)
    from peft.utils import constants

    kind: str = model.config.model_type  # type: ignore[union-attr, assignment]
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind)
    if targets is None or feedforward is None:
        raise AdapterError(
            f"IA3: PEFT knows no modules for models of type {kind!r}; name target_modules and feedforward_modules"
        )
    return tuple(targets), list(feedforward)
