"""Models with inserted layers: what each of their layers is made of, and where it stands among the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reft_ollama.architectures.base import Architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MLP_PARTS = ("mlp_norm", "gate", "up", "mlp_output", "mlp_post_norm")
"""Modules of the second half of a layer, as attributes of an `Architecture`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a layer of the deepened model is made of.

    Attributes:
        attention, mlp: layers of the model before whose parts these are, None for parts that do nothing.
        constant: the layer behind whose output (or, with `inside`, behind whose attention) a part that is None adds a
            vector; -1 stands for the embeddings.
    """

    attention: int | None = None
    mlp: int | None = None
    constant: int | None = None
    inside: bool = False


def origins(config: PretrainedConfig) -> list[Origin] | None:
    """The layers of a deepened model in order; None where no layer was inserted."""
    found: list[Origin] | None = getattr(config, "layer_origins", None)
    return found


def arrange(
    config: PretrainedConfig, after: Collection[int], inside: Collection[int], in_attention: bool
) -> list[Origin]:
    """The layers of a model that adds vectors after some layers, -1 being the embeddings, and inside of some.

    Where layers take turns in their kind, every layer with attention keeps its turn.

    Args:
        in_attention: whether it is the attention of a layer that adds a vector, not its MLP.
    """
    types = getattr(config, "layer_types", None)
    period = 1 if types is None else pattern_length(types)
    found = [Origin(constant=-1)] if -1 in after else []
    for layer in range(config.num_hidden_layers):
        found += [Origin()] * ((layer - len(found)) % period)
        if layer in inside:
            found += (
                [Origin(attention=layer), Origin(mlp=layer, constant=layer, inside=True)]
                if in_attention
                else [Origin(attention=layer, constant=layer, inside=True), Origin(mlp=layer)]
            )
        else:
            found.append(Origin(attention=layer, mlp=layer))
        if layer in after:
            found.append(Origin(constant=layer))
    return found


def in_layer(name: str, architecture: Architecture) -> tuple[int | None, str]:
    """The layer of a module or parameter, None for those outside layers, and its name in there."""
    prefix = architecture.layer.split("{}")[0]
    if not name.startswith(prefix):
        return None, name
    index, _, rest = name.removeprefix(prefix).partition(".")
    return int(index), rest


def source(origin: Origin, part: str, architecture: Architecture) -> int | None:
    """The layer before whose part this is, by the part's name in the layer; None for one that was made."""
    return origin.mlp if architecture.part_of(f".{part}") in MLP_PARTS else origin.attention


def pattern_length(types: list[Any]) -> int:
    """After how many layers their types repeat; 1 also where they never do."""
    repeats = (n for n in range(1, len(types)) if all(kind == types[i % n] for i, kind in enumerate(types)))
    return next(repeats, 1)
