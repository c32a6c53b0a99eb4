"""PEFT checkpoints (huggingface/peft): `adapter_config.json` with `adapter_model.safetensors` or `.bin`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats import refuse_options
from reft_plugins.formats.tensor_files import digest_of, read_pickle, read_safetensors
from reft_plugins.manifest import Parent
from reft_plugins.methods.lora.patterns import peft_alpha

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
TENSOR_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_TENSORS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Settings that the tensors already reflect, that only training reads, or that are checked on their own.

`fan_in_fan_out` says how the base stores its weights; `A` and `B` are `[rank, in]` and `[out, rank]` either way.
"""
_READ = {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"}
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


class PeftFormat:
    """Reads LoRA adapters of PEFT, with rsLoRA, DoRA and `lora_bias`, into the method `lora`."""

    name = "peft"
    writes = False

    def recognises(self, directory: Path) -> bool:
        """An `adapter_config.json` that names a `peft_type` (AdapterHub uses the same file name without it)."""
        path = directory / CONFIG_FILE
        try:
            return path.is_file() and "peft_type" in json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, TypeError):
            return False

    def read(self, directory: Path, base: BaseModel | None, positions: str | None, **options: Any) -> Adapter:
        """Read a checkpoint; it has no options.

        Raises:
            AdapterError: on another kind of adapter than LoRA, a setting that changes what it computes and is not read
                here, or files that are not understood.
        """
        refuse_options(self.name, options)
        if positions not in (None, "all"):
            raise AdapterError(f"{directory}: a LoRA adapter of PEFT works on every token, not at {positions!r}")
        path = directory / CONFIG_FILE
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        _check_supported(path, config)
        file = next((directory / name for name in TENSOR_FILES if (directory / name).is_file()), None)
        if file is None:
            raise AdapterError(f"{directory}: neither {' nor '.join(TENSOR_FILES)} is there")
        raw = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
        tensors = {_our_name(name, file): tensor for name, tensor in raw.items()}
        modules = sorted({name.rpartition(".")[0] for name in tensors})
        _check_complete(file, modules, tensors, bool(config.get("use_dora")))
        alphas = {
            module: peft_alpha(module, config.get("alpha_pattern") or {}, config["lora_alpha"]) for module in modules
        }
        settings = {
            "rank": max(tensors[f"{module}.lora_A"].shape[0] for module in modules),
            "alpha": config["lora_alpha"],
            "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != config["lora_alpha"]},
            "use_rslora": bool(config.get("use_rslora")),
            "dropout": config.get("lora_dropout") or 0.0,
            "target_modules": modules,
        }
        return Adapter.create(
            "lora",
            settings,
            tensors,
            None if base is None else base.identity,
            parents=(Parent(relation="imported", source=f"peft:{directory.name}", digest=digest_of([path, file])),),
            notes={
                "format": f"peft {config.get('peft_version', '')}".strip(),
                "found": f"LoRA on {len(modules)} modules"
                + (" with magnitudes (DoRA)" if config.get("use_dora") else ""),
                "trained_on": str(config.get("base_model_name_or_path")),
            },
        )


def _check_supported(path: Path, config: dict[str, Any]) -> None:
    kind = config["peft_type"]
    if kind != "LORA":
        raise AdapterError(f"{path}: adapters of type {kind} are not read by this version; it reads LORA")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise AdapterError(f"{path}: lora_alpha is {config.get('lora_alpha')!r}, expected a number")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterError(f"{path}: task type {task} is not read; the base must be a causal language model")
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise AdapterError(
            f"{path}: init_lora_weights={init!r} changed the base weights before training, so A and B alone do not say "
            "what was learned. Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias={config['bias']!r} stores biases of the base model, which are not read")
    if config.get("use_dora") and config.get("lora_bias"):
        raise AdapterError(f"{path}: lora_bias together with use_dora is not a combination PEFT defines")
    for name in sorted(set(config) - _WITHOUT_EFFECT - _READ):
        if config[name]:
            raise AdapterError(f"{path}: {name}={config[name]!r} is not read by this version; the adapter needs it")


def _our_name(name: str, file: Path) -> str:
    for suffix, ours in _TENSORS.items():
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return f"{name.removeprefix(_PREFIX).removesuffix(suffix)}.{ours}"
    hint = ""
    if "lora_embedding" in name:
        hint = "; LoRA on embeddings is not read"
    elif ".base_layer." in name:
        hint = "; it is a copy of a base weight: save the adapter with save_embedding_layers=False"
    raise AdapterError(f"{file}: tensor {name!r} is not read{hint}. Read are {_PREFIX}<module>.lora_A/lora_B.weight")


def _check_complete(file: Path, modules: list[str], tensors: dict[str, Tensor], dora: bool) -> None:
    if not modules:
        raise AdapterError(f"{file}: no tensors")
    needed = ["lora_A", "lora_B", *(["magnitude"] if dora else [])]
    for module in modules:
        for name in needed:
            if f"{module}.{name}" not in tensors:
                raise AdapterError(f"{file}: module {module} has no {name}; the file is incomplete")
        if not dora and f"{module}.magnitude" in tensors:
            raise AdapterError(f"{file}: module {module} has a magnitude, but use_dora is not set in {CONFIG_FILE}")
