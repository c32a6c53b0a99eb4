"""Checkpoints of LoRA-Dash as its authors' code writes them.

Their fork of PEFT calls itself LORA in `adapter_config.json`, and adds `lora_index`, `lora_w_u` and `lora_w_vt` to
every module. Their loralib has `lora_index`, `weight_u_top` and `weight_vt_top` in a state without a configuration.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats import refuse_options
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import CONFIG_FILE, TENSOR_FILES
from reft_plugins.formats.peft.keys import without_prefix
from reft_plugins.formats.peft.low_rank import within_rank
from reft_plugins.formats.tensor_files import digest_of, read_tensors, tensor_names
from reft_plugins.manifest import Parent
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import Program, WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "lora_index"
_OURS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_index": "index",
    "lora_w_u": "u",
    "lora_w_vt": "vt",
    "weight_u_top": "u",
    "weight_vt_top": "vt",
}
_PARTS = ("lora_A", "lora_B", "index", "u", "vt")
_TRAINING_ONLY = {"lora_change_a", "lora_change_bb"}
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join([*_OURS, *_TRAINING_ONLY])})(\.(default|weight))*")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def is_lora_dash(directory: Path) -> bool:
    """Whether a directory's tensors have the authors' names; nothing in the files is run."""
    return _tensor_file(directory) is not None


class LoRADashFormat:
    """Reads `W + (alpha / r) B A + sum_i s_i u_i v_i^T` (Si et al. 2024, arXiv:2409.01035)."""

    name = "lora_dash"
    writes = False

    def recognises(self, directory: Path) -> bool:
        """Tensors named `lora_index` beside those of LoRA."""
        return is_lora_dash(directory)

    def read(self, directory: Path, base: BaseModel | None, positions: str | None, **options: Any) -> Adapter:
        """Read a checkpoint.

        The authors' module counts its calls in memory only: reloaded by their code it ignores what it learned in the
        dash phase for 100 calls and then picks other directions. Here the saved directions count at once.

        Args:
            **options: `alpha`, where the files have no `adapter_config.json` (loralib).

        Raises:
            AdapterError: on missing settings or files that are not understood.
        """
        alpha = options.pop("alpha", None)
        refuse_options(self.name, options)
        if positions not in (None, "all"):
            raise AdapterError(f"{directory}: LoRA-Dash works on every token, not at {positions!r}")
        file = _tensor_file(directory)
        if file is None:
            raise AdapterError(f"{directory}: no tensors named {_INDEX}")
        alpha = _alpha(directory, alpha)
        modules = None if base is None else BaseModules.of(base)
        own = _by_module(file, modules)
        files = [path for path in (directory / CONFIG_FILE, file) if path.is_file()]
        parents = (Parent(relation="imported", source=f"{self.name}:{directory.name}", digest=digest_of(files)),)
        directions = max(len(parts["index"]) for parts in own.values())
        notes = {
            "format": "LoRA-Dash authors' code",
            "found": f"LoRA-Dash on {len(own)} modules, {directions} task-specific directions each",
            "assumed": f"the warm-up was over when it was saved, so its directions count; alpha is {alpha:g}",
        }
        identity = None if base is None else base.identity
        ranks = {len(parts["lora_A"]) for parts in own.values()}
        if len(ranks) > 1 or any(_exceeds(parts) for parts in own.values()):
            program = Program(tuple(_delta(module, alpha, parts) for module, parts in own.items()))
            return adapter_of(program, identity, parents=parents, notes=notes)
        settings = {
            "rank": ranks.pop(),
            "alpha": alpha,
            "directions": directions,
            "target_modules": list(own),
        }
        tensors = {f"{module}.{name}": tensor for module, parts in own.items() for name, tensor in parts.items()}
        return Adapter.create(self.name, settings, tensors, identity, parents=parents, notes=notes)


def _delta(module: str, alpha: float, parts: dict[str, Tensor]) -> WeightDelta:
    """Both parts as one product: rows of `A` and of `V^T`, columns of `s B` and of `U diag(s)`."""
    import torch

    a = torch.cat((parts["lora_A"], parts["vt"]))
    b = torch.cat((parts["lora_B"] * (alpha / len(parts["lora_A"])), parts["u"] * parts["index"]), dim=1)
    a, b = within_rank(a, b)
    return WeightDelta(module=module, a=a, b=b)


def _exceeds(parts: dict[str, Tensor]) -> bool:
    """Whether both parts together have a larger rank than the matrix."""
    return len(parts["lora_A"]) + len(parts["vt"]) > min(parts["lora_A"].shape[1], len(parts["lora_B"]))


def _tensor_file(directory: Path) -> Path | None:
    """The one file with LoRA-Dash's tensors: PEFT's names first, then any in a directory without configuration."""
    names = [directory / name for name in TENSOR_FILES]
    if not (directory / CONFIG_FILE).is_file() and directory.is_dir():
        names += sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES)
    present = [path for path in names if path.is_file()]
    return next((path for path in present if any(_INDEX in name for name in tensor_names(path))), None)


def _alpha(directory: Path, given: Any) -> float:
    path = directory / CONFIG_FILE
    if not path.is_file():
        if given is None:
            raise AdapterError(
                f"{directory}: the state of loralib does not say its alpha (lora_alpha); give it: --option alpha=NUMBER"
            )
        found = given
    else:
        try:
            found = json.loads(path.read_text("utf-8")).get("lora_alpha")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise AdapterError(f"{path}: not readable JSON: {error}") from None
        if given is not None and given != found:
            raise AdapterError(f"{path}: lora_alpha is {found!r}, not {given!r}; it is stored and cannot be chosen")
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise AdapterError(f"{path if path.is_file() else directory}: lora_alpha is {found!r}, expected a number")
    return float(found)


def _by_module(file: Path, modules: BaseModules | None) -> dict[str, dict[str, Tensor]]:
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(file).items():
        match = _KEY.fullmatch(name)
        if match is None:
            _check_base_parameter(name, tensor, file, modules)
        elif match["part"] not in _TRAINING_ONLY:
            module = without_prefix(match["module"])
            module = module if modules is None else modules.resolve(module, file)
            own.setdefault(module, {})[_OURS[match["part"]]] = tensor
    for module, parts in own.items():
        parts["index"] = parts.get("index", next(iter(parts.values()))).flatten()
        missing = [name for name in _PARTS if name not in parts]
        if missing:
            raise AdapterError(
                f"{file}: module {module} has no {missing[0]}; loralib's lora_state_dict leaves the directions out, so "
                "save the whole state_dict"
            )
        if parts["u"].shape[-1] != len(parts["index"]) or len(parts["vt"]) != len(parts["index"]):
            raise AdapterError(f"{file}: module {module}: directions and their coefficients differ in number")
    return dict(sorted(own.items()))


def _check_base_parameter(name: str, tensor: Tensor, file: Path, modules: BaseModules | None) -> None:
    """A whole state holds the base too, which must be the base that was given."""
    import torch

    module, _, parameter = without_prefix(name).rpartition(".")
    if modules is None or parameter not in ("weight", "bias"):
        raise AdapterError(f"{file}: tensor {name!r} is not read; give the base (--base) for a whole state")
    own = f"{modules.resolve(module, file)}.{parameter}"
    if not torch.equal(modules.parameter(own).to(tensor.dtype), tensor):
        raise AdapterError(f"{file}: {name} is not the base's own: the base was trained, or it is another base")
