"""The format `peft`: which reader a checkpoint needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats import refuse_options
from reft_plugins.formats.peft import adaption_prompt, lora, prompts, scaled, through_peft
from reft_plugins.formats.peft.checkpoint import Checkpoint, adapter_directories, read_config

_VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
_VARIANTS = ("kasa_config", "monteclora_config", "target_parameters", "use_bdlora", "use_qalora")
"""Settings of LoRA with which it is another method, left to PEFT to merge."""
_READERS: dict[str, Callable[[Checkpoint, BaseModel | None], Adapter]] = {
    "ADALORA": scaled.read_adalora,
    "IA3": scaled.read_ia3,
    "PREFIX_TUNING": prompts.read_prefix,
    "CARTRIDGE": prompts.read_prefix,
    "ADAPTION_PROMPT": adaption_prompt.read,
}


class PeftFormat:
    """Reads every kind of PEFT adapter that changes weights or puts something in front of the prompt.

    LoRA, AdaLoRA, IA3, prompt tuning, P-tuning, prefix tuning and adaption prompts are read from their files; other
    changes of weights are merged by PEFT itself.
    """

    name = "peft"
    writes = True

    def recognises(self, directory: Path) -> bool:
        """An `adapter_config.json` that names a `peft_type`, here or in sub-folders (AdapterHub's has none)."""
        from reft_plugins.formats.lora_dash import is_lora_dash  # which imports parts of this package

        found = adapter_directories(directory)
        return bool(found) and not any(is_lora_dash(folder) for folder in found.values())

    def read(self, directory: Path, base: BaseModel | None, positions: str | None, **options: Any) -> Adapter:
        """Read a checkpoint.

        Args:
            **options: `adapter`, the sub-folder to read where there are several; `initial`, the folder of the adapter
                before training for LoRA that started from PiSSA with `niter`, CorDA or LoRA-GA; `task`, the number of
                the task of multi-task prompt tuning.

        Raises:
            AdapterError: on a setting that changes what the adapter computes and is not read here, or files that are
                not understood.
        """
        adapter, initial, task = (options.pop(name, None) for name in ("adapter", "initial", "task"))
        refuse_options(self.name, options)
        folder = _choose(directory, adapter)
        config = read_config(folder)
        kind = str(config["peft_type"])
        for name, value, belongs in (
            ("initial", initial, kind == "LORA"),
            ("task", task, kind == "MULTITASK_PROMPT_TUNING"),
        ):
            if value is not None and not belongs:
                raise AdapterError(f"{folder}: option {name} does not apply to adapters of type {kind}")
        if positions not in (None, "all"):
            raise AdapterError(f"{folder}: a {kind} adapter of PEFT works on every token, not at {positions!r}")
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            raise AdapterError(
                f"{folder}: task type {config['task_type']} is not read; the base must be a causal language model"
            )
        checkpoint = Checkpoint.open(folder)
        if kind == "LORA" and not any(config.get(name) for name in _VARIANTS):
            return lora.read(checkpoint, base, None if initial is None else Path(str(initial)))
        if kind in _VIRTUAL_TOKENS:
            return prompts.read_virtual_tokens(checkpoint, base, task)
        return _READERS.get(kind, through_peft.read)(checkpoint, base)

    def write(self, adapter: Adapter, directory: Path, base: BaseModel | None = None) -> list[str]:
        """Write LoRA, DoRA, IA3, whole modules, virtual tokens, prefixes and adaption prompts; see `writer.write`."""
        from reft_plugins.formats.peft.writer import write

        return write(adapter, directory, base)


def _choose(directory: Path, adapter: Any) -> Path:
    found = adapter_directories(directory)
    if adapter is None and len(found) == 1:
        return next(iter(found.values()))
    if adapter is not None:
        found |= {child.name: child for child in directory.iterdir() if child.is_dir()} if "" in found else {}
        if adapter in found and adapter_directories(found[adapter]):
            return found[adapter]
    names = ", ".join(name for name in found if name)
    raise AdapterError(
        f"{directory}: it holds the adapters {names}; say which by --option adapter=NAME"
        if adapter is None
        else f"{directory}: there is no adapter {adapter!r} in it; there are {names or 'none but its own'}"
    )
