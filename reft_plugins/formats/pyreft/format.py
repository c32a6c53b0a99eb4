"""The format: reading and writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats import refuse_options
from reft_plugins.formats.activation_names import activation_of
from reft_plugins.formats.interventions import Intervention, assemble, with_subspaces
from reft_plugins.formats.pyreft.files import (
    CONFIG_FILE,
    MODEL_FILE,
    InterventionFile,
    find_interventions,
    folder_of,
    trained_base,
)
from reft_plugins.formats.pyreft.kinds import SUBSPACE_TYPE, layout_of, method_of
from reft_plugins.formats.pyreft.placement import place
from reft_plugins.formats.pyreft.projections import through_projections
from reft_plugins.formats.tensor_files import digest_of, read_pickle
from reft_plugins.manifest import Parent

_PLAIN = "activation identity, because pyreft does not store it"


class PyreftFormat:
    """Interventions of pyreft, of every kind it trains: LoReFT, NoReFT, DiReFT, NodiReFT, ConsReFT, LobiReFT."""

    name = "pyreft"
    writes = True

    def recognises(self, directory: Path) -> bool:
        """Files named `intkey_*.bin`, directly or in `intervenable_model/` of a trainer checkpoint."""
        return folder_of(directory) is not None

    def read(self, directory: Path, base: BaseModel | None, positions: str | None, **options: Any) -> Adapter:
        """Read a checkpoint.

        Args:
            positions: where the interventions were trained; pyreft does not store it. Its own trainers' `f7+l7` is
                `f7+l7;cap=half` (from the raw data set) or `f7+l7;cap=half;trim=1` (from the supervised data sets).
                Where several interventions stand at one place, `f7+l7` are the positions of the first and the second;
                any others are given one by one in their order, separated by `|`, such as `f7|l7|[3]`.
            **options: `activation`: the `act_fn` of the interventions, `identity` unless told; `dropout`: what they
                were trained with, for training on; `kind`: what they compute, where no configuration says so;
                `subspaces`: the rows that are applied, such as `[0, 1]`, of those that work on a choice of them.

        Raises:
            AdapterError: on missing positions, a kind of intervention that is not known or not told, or files that are
                not understood.
        """
        activation = activation_of(options.pop("activation", None), f"{directory}: option 'activation'")
        dropout, kind = options.pop("dropout", 0.0), options.pop("kind", None)
        subspaces = _rows(options.pop("subspaces", None))
        refuse_options(self.name, options)
        if positions is None:
            raise AdapterError(
                f"{directory}: pyreft does not store positions, so they must be given: positions='f7+l7;cap=half' "
                "(command line: --positions). Use what the interventions were trained with; pyreft's supervised data "
                "sets leave the last prompt token out, which is ';trim=1'"
            )
        folder = folder_of(directory)
        if folder is None:
            raise AdapterError(f"{directory}: no files named intkey_*.bin")
        deltas = trained_base(folder)
        trained = len(deltas)
        files = find_interventions(folder, base)
        placed, together = place(folder, files, positions)
        units = {file: _read(file, placed[file], kind, subspaces) for file in files}
        interventions = [unit for file, unit in units.items() if not file.place.in_front]
        if len(interventions) < len(files):
            in_front = [unit for file, unit in units.items() if file.place.in_front]
            deltas = (*deltas, *through_projections(in_front, activation, base, str(folder)))
        paths = [path for path in (folder / CONFIG_FILE, folder / MODEL_FILE) if path.is_file()]
        constant = all(unit.method in ("consreft", "lobireft") for unit in units.values())
        assumed = [] if activation != "identity" or constant else [_PLAIN]
        return assemble(
            interventions,
            None if base is None else base.identity,
            positions=together,
            activation=activation,
            dropout=dropout,
            more=deltas,
            parents=(
                Parent(
                    relation="imported",
                    source=f"pyreft:{directory.name}",
                    digest=digest_of([*(file.path for file in files), *paths]),
                ),
            ),
            notes={
                "format": "pyreft",
                "found": _description(list(units.values()), trained),
                "given": "; ".join(
                    [
                        f"positions {positions if together is None else together}",
                        *([] if activation == "identity" else [f"activation {activation}"]),
                        *([] if kind is None else [f"kind {kind}"]),
                        *([] if subspaces is None else [f"subspaces {list(subspaces)}"]),
                    ]
                ),
                **({"assumed": "; ".join(assumed)} if assumed else {}),
            },
        )

    def write(self, adapter: Adapter, directory: Path, base: BaseModel | None = None) -> list[str]:
        """Write interventions as `ReftModel.save` does; see `writer.write`."""
        from reft_plugins.formats.pyreft.writer import write

        return write(adapter, directory)


def _read(
    file: InterventionFile, placed: tuple[int, Any], kind: str | None, subspaces: tuple[int, ...] | None
) -> Intervention:
    raw, where = read_pickle(file.path), str(file.path)
    layout = layout_of(raw, where)
    method = method_of(layout, file.type, kind, where)
    group, positions = placed
    unit = Intervention(method, file.place.layer, file.place.component, group, positions, layout.read(raw, where))
    if subspaces is None:
        if file.type == SUBSPACE_TYPE and kind is None:
            raise AdapterError(
                f"{where}: a {SUBSPACE_TYPE} applies some rows of its subspace, chosen on every pass and not stored: "
                f"give subspaces=[0, ...], out of 0 to {unit.rank - 1}"
            )
        return unit
    outside = [row for row in subspaces if not 0 <= row < unit.rank]
    if outside:
        raise AdapterError(f"{where}: subspaces {outside} are outside its rows 0 to {unit.rank - 1}")
    return with_subspaces(unit, subspaces)


def _rows(subspaces: Any) -> tuple[int, ...] | None:
    if isinstance(subspaces, str):
        subspaces = [part for part in subspaces.strip("[] ").split(",") if part.strip()]
    if subspaces is None:
        return None
    try:
        rows = tuple(int(row) for row in subspaces)
    except (TypeError, ValueError):
        raise AdapterError(f"option 'subspaces': {subspaces!r} is not a list of rows such as [0, 1]") from None
    if not rows or len(set(rows)) != len(rows):
        raise AdapterError(f"option 'subspaces': one or more different rows are needed, not {list(rows)}")
    return rows


def _description(interventions: Sequence[Intervention], trained_modules: int) -> str:
    kinds = Counter(unit.method for unit in interventions)
    groups = len({unit.group for unit in interventions})
    parts = [f"{count} interventions of kind {kind}" for kind, count in kinds.items()]
    parts.append("one at each place" if groups == 1 else f"{groups} at each place")
    if trained_modules:
        parts.append(f"trained parameters of {trained_modules} modules of the base model")
    return ", ".join(parts)
