"""LoRA adapters of PEFT: rsLoRA, DoRA, biases, patterns, embeddings, and starts that change the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint
from reft_plugins.formats.peft.initial import initial_part
from reft_plugins.formats.peft.lora_tensors import LowRank, grouped
from reft_plugins.formats.peft.low_rank import within_rank
from reft_plugins.formats.peft.saved import add_saved
from reft_plugins.methods.lora.patterns import peft_alpha

if TYPE_CHECKING:
    from torch import Tensor

WITHOUT_EFFECT = {
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "target_modules",
    "trainable_token_indices",
    "velora_config",
}
"""Settings that the tensors already reflect, that only training reads, or that are checked on their own.

`fan_in_fan_out` says how the base stores its weights; `A` and `B` are `[rank, in]` and `[out, rank]` either way.
"""
_READ = {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"}


def read(checkpoint: Checkpoint, base: BaseModel | None, initial: Path | None = None) -> Adapter:
    """Read a LoRA adapter into the method `lora`.

    Args:
        initial: folder of the adapter as it was before training, for starts that changed the base.

    Raises:
        AdapterError: on settings that change what the adapter computes and are not read, or malformed files.
    """
    _check_settings(checkpoint)
    modules = None if base is None else BaseModules.of(base)
    own, rest = grouped(checkpoint, modules)
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    rslora = bool(checkpoint.config.get("use_rslora"))
    start = initial_part(checkpoint, modules, initial)
    for module, parts in own.items():
        a, b, alpha = parts["lora_A"], parts["lora_B"], alpha_of(checkpoint, module)
        if start is not None:
            learned = LowRank(a, b, alpha / (a.shape[0] ** 0.5 if rslora else a.shape[0]), alpha)
            a, b = start(module, learned)
            alpha *= (a.shape[0] / learned.a.shape[0]) ** (0.5 if rslora else 1)
        rank = a.shape[0]
        a, b = within_rank(a, b)
        alpha *= (a.shape[0] / rank) ** (0.5 if rslora else 1)
        tensors |= {f"{module}.{name}": tensor for name, tensor in parts.items()}
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = a, b
        alphas[module] = alpha
    saved = add_saved(checkpoint, rest, modules, tensors)
    return _adapter(checkpoint, base, modules, tensors, alphas, saved)


def alpha_of(checkpoint: Checkpoint, module: str) -> float:
    """The alpha PEFT uses for a module."""
    return peft_alpha(module, checkpoint.config.get("alpha_pattern") or {}, checkpoint.number("lora_alpha"))


def _adapter(
    checkpoint: Checkpoint,
    base: BaseModel | None,
    modules: BaseModules | None,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    saved: list[str],
) -> Adapter:
    config = checkpoint.config
    alpha = checkpoint.number("lora_alpha")
    ranks = {module: tensors[f"{module}.lora_A"].shape[0] for module in alphas}
    rank = max(ranks.values())
    settings: dict[str, Any] = {
        "rank": rank,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha": alpha,
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "lora_bias": any(name.endswith(".lora_bias") for name in tensors),
        "dropout": config.get("lora_dropout") or 0.0,
        "target_modules": list(alphas),
        "modules_to_save": saved,
    }
    return checkpoint.adapter("lora", settings, tensors, base, _found(config, modules, alphas, saved))


def _found(
    config: Mapping[str, Any], modules: BaseModules | None, alphas: Mapping[str, float], saved: list[str]
) -> str:
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    extras = [
        name for name, there in (("rsLoRA", config.get("use_rslora")), ("biases", config.get("lora_bias"))) if there
    ]
    embeddings = sum(modules is not None and modules.is_embedding(module) for module in alphas)
    parts = [f"{kind} on {len(alphas)} modules" + (f" ({', '.join(extras)})" if extras else "")]
    if embeddings:
        parts.append(f"{embeddings} of them embeddings")
    if config.get("init_lora_weights") not in (True, False, None):
        parts.append(f"started by {config['init_lora_weights']}")
    if saved:
        parts.append(f"{len(saved)} modules of the base trained whole")
    return ", ".join(parts)


def _check_settings(checkpoint: Checkpoint) -> None:
    config, path = checkpoint.config, checkpoint.config_file
    checkpoint.number("lora_alpha")
    if config.get("use_dora") and config.get("lora_bias"):
        raise AdapterError(f"{path}: lora_bias together with use_dora is not a combination PEFT defines")
    checkpoint.refuse_unread(_READ, WITHOUT_EFFECT)
