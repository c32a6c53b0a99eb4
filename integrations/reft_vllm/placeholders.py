"""Placeholder tokens in front of a prompt, where virtual tokens and key/value prefixes stand.

An engine puts them there when a request enters it, so that no process before it sees any: prompts, counts of tokens and
echoes are those of the request. What an engine says about prompts is stripped of them on its way out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reft_plugins.errors import ReftError, UnsupportedProgramError
from reft_plugins.program import KeyValuePrefix, Program, VirtualTokens

if TYPE_CHECKING:
    from reft_vllm.execution.state import EngineState


class PromptTooLongError(ReftError, ValueError):
    """A prompt fits the model's context, but not together with what its adapter puts in front."""


def learned_rows(program: Program) -> dict[str, tuple[int, Tensor]]:
    """By target of `Placeholders`: the first placeholder that learned rows stand for, and the rows.

    The pairs of prefixes come first, then virtual tokens.
    """
    from reft_vllm.execution.overwrite import EMBEDDINGS

    rows: dict[str, tuple[int, Tensor]] = {}
    for prefix in program.prefixes:
        if prefix.gate is None:
            rows[f"{prefix.layer}.keys"] = 0, prefix.keys
            rows[f"{prefix.layer}.values"] = 0, prefix.values
    embeddings = [node.embeddings.float() for node in program if isinstance(node, VirtualTokens)]
    if embeddings:
        rows[EMBEDDINGS] = program.in_front - program.virtual_tokens, torch.cat(embeddings)
    return rows


def check_engine(program: Program, model_config: Any) -> None:
    """Refuse placeholders that this model cannot have, before a worker is asked.

    Args:
        model_config: vLLM's.

    Raises:
        UnsupportedProgramError: naming the node and the way out.
    """
    nodes = [node for node in program if isinstance(node, VirtualTokens | KeyValuePrefix)]
    moving = [node for node in nodes if isinstance(node, VirtualTokens) or node.gate is None]
    if moving and model_config.is_multimodal_model:
        raise UnsupportedProgramError(
            f"{moving[0]}: nothing can stand in front of the prompts of {model_config.architecture}, a multimodal "
            "model. Run the adapter with the transformers runtime"
        )
    if any(isinstance(node, KeyValuePrefix) for node in nodes) and model_config.use_mla:
        raise UnsupportedProgramError(
            f"{program.prefixes[0]}: the attention of {model_config.architecture} caches no keys and values (MLA)"
        )
    layers = {prefix.layer for prefix in program.prefixes if prefix.gate is None}
    missing = set(range(model_config.hf_text_config.num_hidden_layers)) - layers
    if layers and missing:
        raise UnsupportedProgramError(
            f"layer {min(missing)} has no key/value pairs, but other layers have: in vLLM its tokens would attend to "
            "placeholders. Run the adapter with the transformers runtime"
        )


def check_worker(program: Program, state: EngineState) -> None:
    """Refuse nodes that this worker's part of the model has no place for.

    Raises:
        UnsupportedProgramError: naming the node.
    """
    from reft_vllm.execution.gated import ONE
    from reft_vllm.execution.overwrite import EMBEDDINGS
    from reft_vllm.execution.tables import check_columns

    gated = Counter((prefix.layer, prefix.projected) for prefix in program.prefixes if prefix.gate is not None)
    if not state.movable and max(gated.values(), default=0) > 1:
        raise UnsupportedProgramError(f"layer {gated.most_common(1)[0][0][0]}: {ONE}")
    check_columns(max([program.in_front, *(len(prefix.keys) for prefix in program.prefixes)]), state.movable)
    for node in program:
        if isinstance(node, VirtualTokens) and 0 in state.layers and EMBEDDINGS not in state.placeholders.targets:
            raise UnsupportedProgramError(f"{node}: this model has not one embedding of tokens that could be replaced")
        if not isinstance(node, KeyValuePrefix) or node.layer not in state.layers:
            continue
        attention = state.gated.layers.get(node.layer)
        if attention is None if node.gate is not None else f"{node.layer}.keys" not in state.placeholders.targets:
            raise UnsupportedProgramError(
                f"{node}: this layer's attention caches no keys and values of its own, or quantised ones"
            )
        if attention is not None and node.gate is not None and not node.projected and not attention.fits:
            raise UnsupportedProgramError(
                f"{node}: its heads are together not as wide as the hidden states, so it cannot be added behind the "
                "output projection. Make it with projected=True"
            )


def check_length(tokens: int, front: int, model_config: Any) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Raises:
        PromptTooLongError: saying how much room there is.
    """
    if front and tokens + front >= model_config.max_model_len:
        raise PromptTooLongError(
            f"the prompt has {tokens} tokens and the adapter puts {front} in front of it, which leaves no room for an "
            f"answer in a context of {model_config.max_model_len} tokens. Shorten the prompt to "
            f"{model_config.max_model_len - front - 1} tokens"
        )


def with_placeholders(request: Any, program: Program | None, model_config: Any) -> tuple[Any, int]:
    """A request as the engine computes it, and how many placeholders it got.

    Each placeholder is the prompt's first token, since penalties look at which tokens a prompt has.

    Args:
        request: vLLM's `EngineCoreRequest`, which stays as it is.

    Raises:
        UnsupportedProgramError: nothing can stand in front of such a request.
        PromptTooLongError: there is no room.
    """
    front = 0 if program is None else program.in_front
    if not front:
        return request, 0
    reason = _unfit(request)
    if reason:
        raise UnsupportedProgramError(f"the adapter puts {front} virtual tokens in front of the prompt, {reason}")
    check_length(len(request.prompt_token_ids), front, model_config)
    longer = copy(request)
    longer.prompt_token_ids = request.prompt_token_ids[:1] * front + request.prompt_token_ids
    moved = _moved(request.sampling_params, front)
    if moved:
        longer.sampling_params = copy(request.sampling_params)
        for name, value in moved.items():
            setattr(longer.sampling_params, name, value)
    return longer, front


def _unfit(request: Any) -> str:
    if request.prompt_embeds is not None or not request.prompt_token_ids:
        return "which is not possible for prompts given as embeddings"
    if request.mm_features:
        return "which is not possible for multimodal prompts"
    if request.sampling_params is None:
        return "which is served for generation only"
    if getattr(request, "resumable", False):
        return "which is not possible for prompts that arrive in parts"
    return ""


def _moved(params: Any, front: int) -> Mapping[str, int]:
    """Settings of a request that count tokens from the start of the prompt."""
    found = {}
    if getattr(params, "prompt_logprob_token_ids", None) is not None:
        found["prompt_logprob_start"] = (params.prompt_logprob_start or 0) + front
    if hasattr(params, "routed_experts_prompt_start"):
        found["routed_experts_prompt_start"] = params.routed_experts_prompt_start + front
    return found
