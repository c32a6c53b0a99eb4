"""AdaLoRA and IA3 of PEFT, which store one small set of tensors per module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft import lora
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint
from reft_plugins.formats.peft.keys import by_module
from reft_plugins.formats.peft.saved import add_saved

if TYPE_CHECKING:
    from torch import Tensor

_ADALORA_READ = {"r", "target_r", "init_r", "lora_alpha"}
_ADALORA_TRAINING = {
    "alpha_pattern",
    "beta1",
    "beta2",
    "deltaT",
    "orth_reg_weight",
    "rank_pattern",
    "tfinal",
    "tinit",
    "total_step",
    "use_rslora",
}
_ADALORA = ("lora_A", "lora_B", "lora_E")
_IA3_READ = {"feedforward_modules", "target_modules"}
_IA3_TRAINING = {"exclude_modules", "fan_in_fan_out", "init_ia3_weights"}


def read_adalora(checkpoint: Checkpoint, base: BaseModel | None) -> Adapter:
    """Read AdaLoRA: `W + s B diag(E) A`; `s` is alpha / init_r, whatever ranks were left (PEFT).

    Raises:
        AdapterError: on settings that are not read, or malformed files.
    """
    checkpoint.refuse_unread(_ADALORA_READ, lora.WITHOUT_EFFECT | _ADALORA_TRAINING)
    modules = None if base is None else BaseModules.of(base)
    own, rest = by_module(checkpoint, _ADALORA, modules)
    tensors: dict[str, Tensor] = {}
    for module, parts in own.items():
        missing = [name for name in _ADALORA if name not in parts]
        if missing:
            raise AdapterError(f"{checkpoint.tensor_file}: module {module} has no {missing[0]}; the file is incomplete")
        if len(parts["lora_A"]):
            tensors |= {f"{module}.{name}": parts[name] for name in _ADALORA[:2]}
            tensors[f"{module}.lora_E"] = parts["lora_E"].flatten()
    initial, alpha = checkpoint.integer("init_r"), checkpoint.number("lora_alpha")
    settings = {
        "initial_rank": initial,
        "target_rank": min(checkpoint.integer("target_r"), max(1, initial - 1)),
        "alpha": max(alpha, 0.0),
        "dropout": checkpoint.config.get("lora_dropout") or 0.0,
        "target_modules": list(own),
    }
    if initial == 1:
        settings |= {"initial_rank": 2, "alpha": max(alpha, 0.0) * 2 or 2.0}
        checkpoint.assumed.append("init_r=1 is kept as 2 with twice the alpha, which is the same scaling")
    saved = add_saved(checkpoint, rest, modules, tensors)
    if saved:
        settings["modules_to_save"] = saved
    empty = len(own) - sum(f"{module}.lora_A" in tensors for module in own)
    found = f"AdaLoRA on {len(own)} modules" + (f", {empty} of which have no rank left" if empty else "")
    return checkpoint.adapter("adalora", settings, tensors, base, found)


def read_ia3(checkpoint: Checkpoint, base: BaseModel | None) -> Adapter:
    """Read IA3: scales `[1, in]` of inputs of feed-forward modules, `[out, 1]` of outputs of the others.

    Raises:
        AdapterError: on settings that are not read, or malformed files.
    """
    checkpoint.refuse_unread(_IA3_READ, _IA3_TRAINING)
    modules = None if base is None else BaseModules.of(base)
    own, rest = by_module(checkpoint, ("ia3_l",), modules)
    tensors: dict[str, Tensor] = {}
    feedforward = []
    for module, parts in own.items():
        scale = parts["ia3_l"]
        if scale.ndim != 2 or 1 not in scale.shape:
            raise AdapterError(f"{checkpoint.tensor_file}: scale of {module} has shape {list(scale.shape)}")
        is_input = scale.shape[0] == 1
        if is_input:
            feedforward.append(module)
        tensors[f"{module}.{'input' if is_input else 'output'}_scale"] = scale.flatten()
    settings = {"target_modules": list(own), "feedforward_modules": feedforward}
    saved = add_saved(checkpoint, rest, modules, tensors)
    if saved:
        settings["modules_to_save"] = saved
    found = f"IA3 on {len(own)} modules, {len(feedforward)} of which are scaled at their input"
    return checkpoint.adapter("ia3", settings, tensors, base, found)
