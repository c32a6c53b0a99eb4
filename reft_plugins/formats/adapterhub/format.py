"""The format: which kind of adapter a checkpoint holds, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError, ReftError
from reft_plugins.formats import refuse_options
from reft_plugins.formats.adapterhub.bottleneck import bottlenecks_of
from reft_plugins.formats.adapterhub.files import CONFIG_FILE, Checkpoint, open_checkpoint, recognises
from reft_plugins.formats.adapterhub.head import head_of
from reft_plugins.formats.adapterhub.lora import deltas_of
from reft_plugins.formats.adapterhub.reft import activation, interventions_of
from reft_plugins.formats.interventions import assemble
from reft_plugins.formats.tensor_files import digest_of
from reft_plugins.manifest import Parent
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import Node, Program, WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

_REFUSED = {
    "prefix_tuning": "its prefixes do not move the positions of the prompt's tokens, which prefixes here do",
    "prompt_tuning": "it leaves the numbering of positions to the model's code, which the file does not say",
    "mtl_lora": "it shares tensors between tasks, chosen on every call",
}


class AdapterHubFormat:
    """Bottleneck, ReFT, LoRA and IA3 adapters of the library `adapters`, and unions of the last two with the first."""

    name = "adapterhub"
    writes = False

    def recognises(self, directory: Path) -> bool:
        """An `adapter_config.json` that has a `config` inside, and no `peft_type`."""
        return recognises(directory)

    def read(self, directory: Path, base: BaseModel | None, positions: str | None, **options: Any) -> Adapter:
        """Read a checkpoint; its positions are stored.

        Args:
            **options: `variant`: `noreft` or `direft`, which the library saves alike.

        Raises:
            AdapterError: on a kind of adapter or a setting that cannot be executed, when `variant` is needed and not
                given, or on files that are not understood.
        """
        variant = options.pop("variant", None)
        refuse_options(self.name, options)
        if positions is not None:
            raise AdapterError(f"{directory}: AdapterHub stores positions; they are part of what was learned")
        try:
            return self._read(directory, base, variant)
        except ReftError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise AdapterError(
                f"{directory / CONFIG_FILE}: its settings and tensors are not those of an adapter of the library "
                f"`adapters`: {type(error).__name__}: {error}"
            ) from error

    def _read(self, directory: Path, base: BaseModel | None, variant: str | None) -> Adapter:
        checkpoint = open_checkpoint(directory, base)
        kind = checkpoint.config.get("architecture")
        if variant is not None and kind != "reft":
            raise AdapterError(f"{directory}: option 'variant' tells NoReFT from DiReFT; this is neither")
        head, said, head_file = head_of(checkpoint)
        files = [checkpoint.config_file, checkpoint.file, *([] if head_file is None else [head_file])]
        common: dict[str, Any] = {
            "parents": (Parent(relation="imported", source=f"adapterhub:{directory.name}", digest=digest_of(files)),),
            "notes": {
                "format": f"adapterhub {checkpoint.document.get('version', '')}".strip(),
                "head": said,
                "trained_on": str(checkpoint.document.get("model_name")),
            },
        }
        if kind == "reft":
            return _reft(checkpoint, variant, head, common)
        return _others(checkpoint, head, common)


def _reft(checkpoint: Checkpoint, variant: str | None, head: Sequence[Node], common: dict[str, Any]) -> Adapter:
    interventions, together, assumed = interventions_of(checkpoint, variant)
    notes = {
        **common["notes"],
        "found": f"{len(interventions)} interventions of kind {interventions[0].method}",
        **({"given": f"variant {variant}"} if variant else {}),
        **({"assumed": "; ".join(assumed)} if assumed else {}),
    }
    return assemble(
        interventions,
        None if checkpoint.base is None else checkpoint.base.identity,
        positions=together,
        activation=activation(checkpoint),
        dropout=float(checkpoint.config.get("dropout") or 0.0),
        more=head,
        parents=common["parents"],
        notes=notes,
    )


def _others(checkpoint: Checkpoint, head: Sequence[Node], common: dict[str, Any]) -> Adapter:
    identity = None if checkpoint.base is None else checkpoint.base.identity
    bottlenecks: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    deltas: list[WeightDelta] = []
    for config in _parts(checkpoint.config):
        kind = config.get("architecture")
        if kind in (None, "bottleneck"):
            bottlenecks.append(bottlenecks_of(checkpoint, config))
        elif kind == "lora":
            deltas.extend(deltas_of(checkpoint, config))
        else:
            why = f": {_REFUSED[kind]}" if kind in _REFUSED else ""
            raise AdapterError(
                f"{checkpoint.config_file}: adapters of architecture {kind!r} are not read{why}. Read are bottleneck, "
                "ReFT, LoRA and IA3 adapters"
            )
    found = [f"bottleneck adapters writing {', '.join(settings['placement'])}" for settings, _ in bottlenecks]
    if deltas:
        found.append(f"changes of {len(deltas)} modules")
    notes = {**common["notes"], "found": "; ".join(found)}
    if len(bottlenecks) == 1 and not deltas and not head:
        settings, tensors = bottlenecks[0]
        return Adapter.create("bottleneck", settings, tensors, identity, parents=common["parents"], notes=notes)
    nodes = [*(node for part in bottlenecks for node in _lowered(*part)), *deltas, *head]
    return adapter_of(Program(tuple(nodes)), identity, parents=common["parents"], notes=notes)


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configurations of a union, or the only one."""
    if config.get("architecture") != "union":
        return [config]
    return list(config.get("configs") or [])


def _lowered(settings: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Node, ...]:
    method = plugins.methods.get("bottleneck")
    program: Program = method.lower(parse_config(method, settings), tensors)
    return program.nodes
