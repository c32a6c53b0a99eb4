"""pyreft checkpoints (stanfordnlp/pyreft 0.1): what `ReftModel.save` and its trainer's checkpoints hold.

A directory has `config.json` and one `intkey_layer_<l>_comp_<component>_unit_pos_nunit_1#<k>.bin` per intervention;
`#k` counts the interventions at one place: prefix 0, suffix 1 where they learned parameters of their own. A trainer
checkpoint keeps the same files without `config.json` in `intervenable_model/`. Positions, activation and dropout are in
neither.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats import refuse_options
from reft_plugins.formats.tensor_files import digest_of, read_pickle
from reft_plugins.manifest import Parent
from reft_plugins.positions import Positions
from reft_plugins.program import COMPONENTS

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_FOLDER = "intervenable_model"

_FILE = re.compile(r"intkey_layer_(\d+)_comp_(\w+)_unit_(\w+?)_nunit_(\d+)#(\d+)\.bin")
_TYPES_READ = ("LoreftIntervention",)
_LOREFT_TENSORS = {"weight", "bias", "rotate_layer"}


@dataclass(frozen=True, slots=True)
class _Intervention:
    file: Path
    layer: int
    component: str
    group: int

    @property
    def unit(self) -> str:
        return f"layers.{self.layer}.{self.component}.{self.group}"


class PyreftFormat:
    """Reads LoReFT interventions of pyreft into the method `loreft`."""

    name = "pyreft"
    writes = False

    def recognises(self, directory: Path) -> bool:
        """Files named `intkey_*.bin`, directly or in `intervenable_model/` of a trainer checkpoint."""
        return any(any(folder.glob("intkey_*.bin")) for folder in (directory, directory / CHECKPOINT_FOLDER))

    def read(self, directory: Path, base: BaseModel | None, positions: str | None, **options: Any) -> Adapter:
        """Read a checkpoint.

        Args:
            positions: where the interventions were trained; pyreft does not store it. Its own trainers' `f7+l7` is
                `f7+l7;cap=half` (from the raw data set) or `f7+l7;cap=half;trim=1` (from the supervised data sets).
            **options: `activation`, the `act_fn` of the interventions, `identity` unless told.

        Raises:
            AdapterError: on missing positions, another type of intervention, or files that are not understood.
        """
        activation = options.pop("activation", "identity")
        refuse_options(self.name, options)
        if positions is None:
            raise AdapterError(
                f"{directory}: pyreft does not store positions, so they must be given: positions='f7+l7;cap=half' "
                "(command line: --positions). Use what the interventions were trained with; pyreft's supervised data "
                "sets leave the last prompt token out, which is ';trim=1'"
            )
        parsed = Positions.parse(positions)
        folder = directory if any(directory.glob("intkey_*.bin")) else directory / CHECKPOINT_FOLDER
        _check_types(folder)
        _check_base_untouched(folder)
        interventions = _find(folder)
        shared = not any(intervention.group for intervention in interventions)
        _check_groups(folder, interventions, parsed, shared)
        tensors: dict[str, Tensor] = {}
        for intervention in interventions:
            tensors.update(_read_loreft(intervention))
        config = {
            "rank": max(len(tensor) for name, tensor in tensors.items() if name.endswith(".weight")),
            "layers": sorted({intervention.layer for intervention in interventions}),
            "positions": str(parsed),
            "component": interventions[0].component,
            "shared": shared,
            "activation": activation,
        }
        files = [intervention.file for intervention in interventions]
        return Adapter.create(
            "loreft",
            config,
            tensors,
            None if base is None else base.identity,
            parents=(Parent(relation="imported", source=f"pyreft:{directory.name}", digest=digest_of(files)),),
            notes={
                "format": "pyreft",
                "found": f"{len(files)} LoReFT interventions, {'shared' if shared else 'prefix and suffix apart'}",
                "given": f"positions {parsed}",
                "assumed": f"activation {activation}, because pyreft does not store it",
            },
        )


def _check_types(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        types = json.loads(path.read_text("utf-8"))["intervention_types"]
        names = {re.sub(r"^<class '(.*)'>$", r"\1", str(kind)).rpartition(".")[2] for kind in types}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{path}: not a configuration of pyreft: {type(error).__name__}: {error}") from None
    for name in sorted(names):
        if name not in _TYPES_READ:
            raise AdapterError(
                f"{path}: interventions of type {name} are not read; this version reads {', '.join(_TYPES_READ)}"
            )


def _check_base_untouched(folder: Path) -> None:
    """A trainer checkpoint also keeps trained parameters of the base model, which an intervention cannot express."""
    path = folder / "pytorch_model.bin"
    if path.is_file() and (trained := read_pickle(path)):
        raise AdapterError(
            f"{path}: parameters of the base model were trained too ({len(trained)}, first {next(iter(trained))}); "
            "only the interventions can be read"
        )


def _find(folder: Path) -> list[_Intervention]:
    found = []
    for path in sorted(folder.glob("intkey_*.bin")):
        match = _FILE.fullmatch(path.name)
        if match is None or match[2] not in COMPONENTS or match[3] != "pos":
            raise AdapterError(
                f"{path}: the name does not say a decoder layer and component that is known here. Read are token "
                f"positions (unit 'pos') of {', '.join(COMPONENTS)}, not module paths or heads"
            )
        found.append(_Intervention(path, int(match[1]), match[2], int(match[5])))
    components = sorted({intervention.component for intervention in found})
    if len(components) > 1:
        raise AdapterError(f"{folder}: interventions on several components ({', '.join(components)}) are not read")
    return found


def _check_groups(folder: Path, found: list[_Intervention], positions: Positions, shared: bool) -> None:
    groups = 1 if shared else len(positions.parts())
    for layer in sorted({intervention.layer for intervention in found}):
        numbers = sorted(intervention.group for intervention in found if intervention.layer == layer)
        if numbers != list(range(groups)):
            raise AdapterError(
                f"{folder}: layer {layer} has interventions #{', #'.join(map(str, numbers))}, but positions "
                f"{str(positions)!r} mean {groups} of them. With parameters of their own for prefix and suffix (#0 and "
                "#1) positions have both parts, such as 'f7+l7'"
            )


def _read_loreft(intervention: _Intervention) -> dict[str, Tensor]:
    """`rotate_layer` is stored effective, `[hidden, rank]`; `weight` `[rank, hidden]` may be bfloat16."""
    raw = read_pickle(intervention.file)
    where = intervention.file
    unknown = sorted(set(raw) - _LOREFT_TENSORS)
    if unknown or not {"weight", "rotate_layer"} <= set(raw):
        raise AdapterError(
            f"{where}: tensors {', '.join(sorted(raw)) or 'none'} are not those of a LoReFT intervention "
            f"({', '.join(sorted(_LOREFT_TENSORS))}); other types are not read by this version"
        )
    weight, rotate = raw["weight"].float(), raw["rotate_layer"].float()
    if weight.ndim != 2 or rotate.shape != weight.shape[::-1]:
        raise AdapterError(
            f"{where}: weight {list(weight.shape)} and rotate_layer {list(rotate.shape)} must be [rank, hidden] and "
            "[hidden, rank]"
        )
    tensors = {f"{intervention.unit}.weight": weight, f"{intervention.unit}.rotate": rotate.T.contiguous()}
    if "bias" in raw:
        tensors[f"{intervention.unit}.bias"] = raw["bias"].float()
    return tensors
