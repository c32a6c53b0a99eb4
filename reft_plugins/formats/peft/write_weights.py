"""Weight deltas as PEFT's LoRA or IA3, with modules that were trained whole beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.program import WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
"""Names of embeddings, for adapters whose base is not at hand."""


def weights(
    deltas: Sequence[WeightDelta], modules: BaseModules | None, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter that only changes weights; appends to `notes` what they do not say.

    Raises:
        AdapterError: when PEFT has no such change of weights.
    """
    for delta in deltas:
        if not delta.positions.everywhere:
            raise AdapterError(f"{delta} applies at {delta.positions} only; PEFT's adapters apply to every token")
    names = [delta.module for delta in deltas]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise AdapterError(f"{twice[0]} is changed twice; PEFT's adapters change a module once")
    scaled = [delta for delta in deltas if delta.input_scale is not None or delta.output_scale is not None]
    learned = [delta for delta in deltas if delta.a is not None or delta.magnitude is not None]
    if scaled and learned:
        raise AdapterError(
            f"PEFT's adapters scale modules or add to their weights; {scaled[0]} and {learned[0]} differ"
        )
    if any(delta.a is None and delta.magnitude is None and delta.bias is not None for delta in deltas):
        raise AdapterError("PEFT learns a bias beside A and B only; merge the adapter's bias into a new one")
    if not scaled and not learned:
        learned = [_nothing(names, modules, notes)]
    config, tensors = _ia3(scaled) if scaled else _lora(learned, modules)
    saved: list[str] = []
    for delta in deltas:
        if delta.replaces:
            _add_whole(delta, delta in (*scaled, *learned), modules, config, tensors, saved, notes)
    config["modules_to_save"] = saved or None
    return config, tensors


def _nothing(taken: Sequence[str], modules: BaseModules | None, notes: list[str]) -> WeightDelta:
    """LoRA that adds zero to some module, for PEFT loads no adapter without one."""
    import torch

    if modules is None:
        raise AdapterError("PEFT saves whole modules only beside LoRA on some other module; to choose one, give --base")
    free = (name for name, kind in modules.kinds.items() if kind in ("Linear", "Conv1D") and name not in taken)
    module = next(free, None)
    if module is None:
        raise AdapterError("every linear module of the base is replaced: save a whole model instead of an adapter")
    notes.append(f"that nothing is learned beside whole modules: PEFT wants LoRA somewhere, a zero one is in {module}")
    outputs, inputs = modules.matrix(module).shape
    return WeightDelta(module=module, a=torch.zeros(1, inputs), b=torch.zeros(outputs, 1))


def _lora(deltas: Sequence[WeightDelta], modules: BaseModules | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import torch

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dora = any(delta.magnitude is not None for delta in deltas)
    biased = any(delta.bias is not None for delta in deltas)
    if dora and biased:
        raise AdapterError("PEFT has no DoRA with a learned bias")
    for delta in deltas:
        if delta.a is None or delta.b is None:
            raise AdapterError(f"{delta}: PEFT has no DoRA without A and B")
        name, embedding = f"{_PREFIX}{delta.module}", _is_embedding(delta.module, modules)
        ranks[delta.module], alphas[delta.module] = delta.rank, delta.scaling * delta.rank
        if embedding:
            tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"] = delta.a, delta.b
        else:
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = delta.a, delta.b
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = _magnitude(delta, modules)
        if biased:
            if embedding or (delta.bias is not None and not delta.scaling):
                raise AdapterError(f"{delta}: PEFT has no learned bias there")
            bias = torch.zeros(len(delta.b)) if delta.bias is None else delta.bias / delta.scaling
            tensors[f"{name}.lora_B.bias"] = bias
    largest = max(ranks, key=ranks.__getitem__)  # vLLM admits an adapter by `r`, whatever the patterns say
    rank, alpha = ranks[largest], alphas[largest]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(module): own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {re.escape(module): own for module, own in alphas.items() if own != alpha},
        "target_modules": list(ranks),
        "use_dora": dora,
        "use_rslora": False,
        "lora_bias": biased,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": modules is not None and any(modules.is_transposed(module) for module in ranks),
    }
    return config, tensors


def _ia3(deltas: Sequence[WeightDelta]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    feedforward = []
    for delta in deltas:
        if delta.input_scale is not None and delta.output_scale is not None:
            raise AdapterError(f"{delta}: IA3 of PEFT scales the input or the output of a module, not both")
        if delta.bias is not None:
            raise AdapterError(f"{delta}: IA3 of PEFT learns no bias")
        if delta.input_scale is not None:
            feedforward.append(delta.module)
            scale = delta.input_scale[None]
        elif delta.output_scale is not None:
            scale = delta.output_scale[:, None]
        tensors[f"{_PREFIX}{delta.module}.ia3_l"] = scale
    config = {
        "peft_type": "IA3",
        "target_modules": [delta.module for delta in deltas],
        "feedforward_modules": feedforward,
        "init_ia3_weights": True,
    }
    return config, tensors


def _magnitude(delta: WeightDelta, modules: BaseModules | None) -> Tensor:
    """Row norms; where none were learned, those of the changed weight, which leave it as it is."""
    if delta.magnitude is not None:
        return delta.magnitude
    if modules is None or delta.a is None or delta.b is None or delta.new_weight is not None:
        raise AdapterError(
            f"{delta} has no magnitude and other modules have: PEFT's DoRA wants one of every module, which takes the "
            "base's weights: give the base (--base)"
        )
    norms: Tensor = (modules.matrix(delta.module) + delta.scaling * (delta.b @ delta.a)).norm(dim=1)
    return norms


def _add_whole(
    delta: WeightDelta,
    targeted: bool,
    modules: BaseModules | None,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    saved: list[str],
    notes: list[str],
) -> None:
    """Parameters that stand in for the base's own: beside A and B in the wrapped module, else in `modules_to_save`."""
    own = {"weight": delta.new_weight, "bias": delta.new_bias}
    given = {name: tensor for name, tensor in own.items() if tensor is not None}
    if targeted:
        tensors |= {f"{_PREFIX}{delta.module}.base_layer.{name}": tensor for name, tensor in given.items()}
        notes.append(f"{delta.module}: PEFT overwrites the {' and '.join(given)} of the loaded base model itself")
        if "bias" in given and config["peft_type"] == "LORA" and config["bias"] == "none":
            config["bias"] = "lora_only"
        return
    if modules is not None:
        for name in own:
            full = f"{delta.module}.{name}"
            if name not in given and full in modules.shapes:
                given[name] = modules.parameter(full)
    elif "weight" not in given:
        raise AdapterError(f"{delta}: PEFT saves modules whole, with the weight that was not trained: give --base")
    else:
        notes.append(f"{delta.module} without a bias: if it has one in the base, write it again with --base")
    tensors |= {f"{_PREFIX}{delta.module}.{name}": tensor for name, tensor in given.items()}
    saved.append(delta.module)


def _is_embedding(module: str, modules: BaseModules | None) -> bool:
    return module.rpartition(".")[2] in _EMBEDDINGS if modules is None else modules.is_embedding(module)
