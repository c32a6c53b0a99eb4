"""Bottleneck adapters of AdapterHub: sequential, parallel, scaled, Compacter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import AdapterError
from reft_plugins.formats.activation_names import activation_of
from reft_plugins.formats.adapterhub.compacter import dense
from reft_plugins.formats.adapterhub.files import Checkpoint
from reft_plugins.formats.adapterhub.placement import placement

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(
    r"(?:.*\.)?(\d+)\.(attention\.output|attention_adapters|output|output_adapters)\.adapters\.[^.]+\.(.+)"
)
_REFUSED = {
    "ln_before": "a norm of its own in front of the bottleneck",
    "ln_after": "a norm of its own behind the bottleneck",
    "use_gating": "a gate over the mean of the whole sequence",
    "cross_adapter": "adapters in cross-attention",
}
"""Settings that no edit computes."""


def bottlenecks_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of the method `bottleneck`.

    Raises:
        AdapterError: on a setting that an `Edit` cannot say, or files that are not understood.
    """
    for name, what in _REFUSED.items():
        if config.get(name):
            raise AdapterError(f"{checkpoint.config_file}: {name}={config[name]!r} is {what}, which cannot be executed")
    # Old task adapters name an inv_adapter that they do not have; the library leaves it out as well.
    if any("invertible_adapters." in name for name in checkpoint.tensors):
        raise AdapterError(f"{checkpoint.file}: the invertible adapter behind the embeddings cannot be executed")
    wanted = {"attention": config.get("mh_adapter"), "mlp": config.get("output_adapter")}
    tensors: dict[str, Tensor] = {}
    sites: dict[str, str] = {}
    units = _units(checkpoint)
    for (layer, branch), raw in sorted(units.items()):
        if not wanted[branch]:
            continue
        where = f"{checkpoint.file}: layer {layer}, {branch}"
        writes, reads = placement(branch, config, checkpoint.model_type, str(checkpoint.config_file))
        sites[writes] = reads
        for name, tensor in _tensors(raw, config, checkpoint, where).items():
            tensors[f"layers.{layer}.{writes}.{name}"] = tensor
    if not tensors:
        raise AdapterError(
            f"{checkpoint.file}: none of the bottleneck adapters that {checkpoint.config_file.name} names"
        )
    scaling = config.get("scaling", 1.0)
    settings: dict[str, Any] = {
        "placement": sites,
        "bottleneck_size": max(len(tensor) for name, tensor in tensors.items() if name.endswith(".down")),
        "activation": activation_of(config.get("non_linearity"), str(checkpoint.config_file)),
        "scaling": scaling if isinstance(scaling, str) else float(scaling),
        "layers": sorted({layer for layer, branch in units if wanted[branch]}),
    }
    return settings, tensors


def _units(checkpoint: Checkpoint) -> dict[tuple[int, str], dict[str, Tensor]]:
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        branch = "attention" if match[2].startswith("attention") else "mlp"
        unit = found.setdefault((int(match[1]), branch), {})
        if match[3] in unit:
            raise AdapterError(f"{checkpoint.file}: two tensors {name!r} for one layer: encoder-decoders are not read")
        unit[match[3]] = tensor
    return found


def _tensors(
    raw: Mapping[str, Tensor], config: Mapping[str, Any], checkpoint: Checkpoint, where: str
) -> dict[str, Tensor]:
    """`down`, `up` `[size, hidden]` and what belongs to them."""
    if config.get("phm_layer"):
        shared = {
            name.rpartition(".")[2]: tensor
            for name, tensor in checkpoint.tensors.items()
            if "shared_parameters." in name
        }
        down, down_bias = dense(raw, shared, "adapter_down.0", "down", where)
        up, up_bias = dense(raw, shared, "adapter_up", "up", where)
        found = {"down": down.T, "up": up, "down_bias": down_bias, "up_bias": up_bias}
    else:
        try:
            found = {"down": raw["adapter_down.0.weight"].float(), "up": raw["adapter_up.weight"].float().T}
        except KeyError as error:
            raise AdapterError(f"{where}: no {error} among {', '.join(sorted(raw))}") from None
        found |= {"down_bias": _bias(raw, "adapter_down.0.bias"), "up_bias": _bias(raw, "adapter_up.bias")}
    if config.get("scaling") in ("learned", "channel"):
        if "scaling" not in raw:
            raise AdapterError(f"{where}: scaling is {config['scaling']!r}, but there is no such tensor")
        found["scaling"] = raw["scaling"].float()
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _bias(raw: Mapping[str, Tensor], name: str) -> Any:
    return raw[name].float() if name in raw else None
