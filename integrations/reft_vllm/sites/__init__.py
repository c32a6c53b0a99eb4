"""Where the op is put into a vLLM model: components of decoder layers, linear modules, embeddings, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from reft_plugins.layers import decoder_layers
from reft_vllm.execution.state import EngineState
from reft_vllm.settings import GATED_PREFIXES, LINEARS, PREFIXES, VIRTUAL_TOKENS
from reft_vllm.sites.attention import install_attention
from reft_vllm.sites.components import install_components
from reft_vllm.sites.embeddings import install_embeddings
from reft_vllm.sites.linears import install_linears


def install_sites(model: nn.Module, count: int, packed: Mapping[str, Sequence[str]], state: EngineState) -> None:
    """Put every site of the settings into the part of a model that this worker holds.

    Args:
        count: decoder layers of the whole model; those of other pipeline ranks are placeholders.
        packed: vLLM's names of merged modules with those of their parts in checkpoints.

    Raises:
        UnsupportedProgramError: the model has no list of `count` decoder layers.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    prefix, every = decoder_layers(model, count)
    layers = [(index, layer) for index, layer in enumerate(every) if not isinstance(layer, PPMissingLayer)]
    state.layers, state.layers_prefix = frozenset(index for index, _ in layers), prefix
    if LINEARS in state.settings.sites:
        install_linears(prefix, layers, packed, state)
    if state.settings.sites & {PREFIXES, GATED_PREFIXES}:
        install_attention(prefix, layers, state)
    if VIRTUAL_TOKENS in state.settings.sites:
        install_embeddings(model, state)
    install_components(prefix, layers, state)
