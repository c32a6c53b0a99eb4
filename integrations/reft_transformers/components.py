"""Where the components of a model's layers are: which module's input or output is which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.layers import decoder_layers
from reft_plugins.program import COMPONENTS, ORDER, canonical
from reft_transformers.architectures import (
    ATTENTION_NAMES,
    DOWN_NAMES,
    LAYOUTS,
    MLP_NAMES,
    PROJECTION_NAMES,
    Layout,
)
from reft_transformers.structure import search


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a component is: the input or the output of a module.

    Attributes:
        kept_by: the layer, where it adds the component to its output as it was before the module took it in; a change
            of it is added to the output then.
    """

    module: nn.Module
    side: Literal["input", "output"]
    kept_by: nn.Module | None = None


class Components:
    """The layers of a model and their parts.

    Args:
        model: of transformers.

    Raises:
        UnsupportedProgramError: the model has two stacks of layers, or none was found; says what was looked for.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if config is not None else None
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedProgramError(
                f"{type(model).__name__} has an encoder and a decoder; programs name the layers of one stack"
            )
        self.model = model
        self.layers = decoder_layers(model, getattr(text, "num_hidden_layers", None))[1]
        self.architecture = str(getattr(text, "model_type", None) or type(model).__name__)
        self.known = self.architecture in LAYOUTS
        self.layout: Layout = LAYOUTS[self.architecture] if self.known else search(model, self.layers[0])
        if getattr(self.layers[0], "use_parallel_residual", False):
            self.layout = replace(self.layout, residual="parallel")

    def layer(self, index: int) -> nn.Module:
        """A layer.

        Raises:
            AdapterError: it is outside the model.
        """
        if not 0 <= index < len(self.layers):
            raise AdapterError(f"layer {index} is outside the base model, which has layers 0 to {len(self.layers) - 1}")
        return self.layers[index]

    def locate(self, layer: int, component: str) -> Place:
        """Where a component is.

        Raises:
            AdapterError: the layer is outside the model, or there is no such component.
            UnsupportedProgramError: this architecture does not have the component.
        """
        block, layout, component = self.layer(layer), self.layout, canonical(component)
        if component == "block_input":
            return Place(block, "input")
        if component == "block_output":
            return Place(block, "output")
        if component == "mlp_residual":
            if layout.residual == "parallel":
                raise UnsupportedProgramError(
                    f"{self.architecture} adds attention and MLP to the same input, so it has no mlp_residual; "
                    f"attention_residual is that input"
                )
            entry = self._part(block, layout.mlp_entry, component)
            return Place(entry, "output") if layout.residual == "post_norm" else Place(entry, "input", block)
        if component not in ORDER:
            raise AdapterError(f"unknown component {component!r}; known are {', '.join(COMPONENTS)}")
        name, side = {
            "attention_value_output": (layout.attention_projection, "input"),
            "attention_output": (layout.attention_branch, "output"),
            "mlp_activation": (layout.mlp_projection, "input"),
            "mlp_output": (layout.mlp_branch, "output"),
        }[component]
        return Place(self._part(block, name, component), side)  # type: ignore[arg-type]

    def attention(self, layer: int) -> nn.Module:
        """The module of a layer that calls transformers' attention function; raises as `locate`."""
        return self._part(self.layer(layer), self.layout.attention, "attention")

    def attention_projection(self, layer: int) -> nn.Module:
        """The output projection of a layer's attention; raises as `locate`."""
        return self._part(self.layer(layer), self.layout.attention_projection, "attention projection")

    def module(self, name: str, node: object) -> nn.Module:
        """A module of the base by its qualified name.

        Raises:
            AdapterError: naming the node that asks for it.
        """
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise AdapterError(f"{node}: the base model {type(self.model).__name__} has no module {name!r}") from None

    def _part(self, block: nn.Module, name: str, component: str) -> nn.Module:
        if name:
            try:
                return block.get_submodule(name)
            except AttributeError:
                pass
        tried = (
            f"the table has {name!r} for {self.architecture}"
            if self.known
            else f"{self.architecture} is not in the table ({', '.join(LAYOUTS)}), and among the parts of its layer "
            f"({', '.join(n for n, _ in block.named_children())}) the search tried the names "
            f"{', '.join(dict.fromkeys((*ATTENTION_NAMES, *MLP_NAMES, *PROJECTION_NAMES, *DOWN_NAMES)))}, "
            f"and two parts whose outputs add up to the layer's"
        )
        raise UnsupportedProgramError(
            f"the transformers runtime finds no {component} in {type(block).__name__}: {tried}"
        )
