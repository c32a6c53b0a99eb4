"""Where the components of a decoder layer are in a transformers model: one table, and a search by structure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.layers import decoder_layers
from reft_plugins.program import WeightDelta

SUBMODULES: dict[str, tuple[str, ...]] = {
    "attention_output": ("self_attn", "attn", "attention", "self_attention"),
    "mlp_output": ("mlp", "feed_forward", "ffn"),
}
"""Submodule whose output is the component, by the names in use (Llama, Mistral, Qwen, Gemma, Phi; GPT-2; GPT-NeoX)."""


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """The decoder layers of a model, and its modules by name."""

    model: nn.Module
    layers: nn.ModuleList

    @classmethod
    def find(cls, model: nn.Module) -> Components:
        """Find the decoder layers.

        Raises:
            UnsupportedProgramError: listing what was tried.
        """
        config = getattr(model, "config", None)
        text_config = config.get_text_config() if config is not None else None
        count = getattr(text_config, "num_hidden_layers", None)
        return cls(model, decoder_layers(model, count)[1])

    def locate(self, layer: int, component: str) -> tuple[nn.Module, bool]:
        """The module whose output (or input, if the flag is True) is a component.

        Raises:
            AdapterError: the layer is outside the model.
            UnsupportedProgramError: the component has no module in this architecture.
        """
        if not 0 <= layer < len(self.layers):
            raise AdapterError(f"layer {layer} is outside the base model, which has layers 0 to {len(self.layers) - 1}")
        block = self.layers[layer]
        if component in ("block_input", "block_output"):
            return block, component == "block_input"
        for name in SUBMODULES.get(component, ()):
            if hasattr(block, name):
                return getattr(block, name), False
        raise UnsupportedProgramError(
            f"the transformers runtime does not edit {component} of {type(block).__name__}; it edits block_input, "
            f"block_output, {', '.join(SUBMODULES)}"
        )

    def linear(self, name: str, delta: WeightDelta) -> nn.Module:
        """The linear module a `WeightDelta` names, of matching size.

        Raises:
            AdapterError: when there is none.
        """
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise AdapterError(f"{delta}: the base model {type(self.model).__name__} has no module {name!r}") from None
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
            raise UnsupportedProgramError(f"{delta}: {type(module).__name__} is not a linear module")
        if delta.a is not None and delta.b is not None:
            size = tuple(weight.shape) if type(module).__name__ != "Conv1D" else tuple(weight.T.shape)
            if size != (delta.b.shape[0], delta.a.shape[1]):
                raise AdapterError(
                    f"{delta}: made for {delta.b.shape[0]} x {delta.a.shape[1]}, "
                    f"the base module is {size[0]} x {size[1]}"
                )
        return module
