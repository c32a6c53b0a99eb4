"""Writing interventions as pyreft saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.errors import AdapterError
from reft_plugins.formats.orthogonal import orthogonal_state
from reft_plugins.formats.pyreft.files import CONFIG_FILE
from reft_plugins.methods.interventions.units import Unit, UnitTensors, units_in

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "direft": "NodireftIntervention",
    "direft_orthonormal": "DireftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
}
ACTIVATIONS = {name: name for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")}
ACTIVATIONS |= {"identity": "linear", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our activations by transformers' names, which pyreft's `act_fn` takes; it has no `elu`."""

_COMPONENTS = ("block_input", "block_output", "attention_output", "attention_value_output", "mlp_output")
_NORM_IN_BRANCH = ("Gemma2", "Gemma3")


def write(adapter: Adapter, directory: Path) -> list[str]:
    """`config.json` and `intkey_*.bin`, as `ReftModel.save` of pyreft 0.1 writes them.

    Returns:
        what these files do not say: positions, activation, and what pyreft needs to be told when it loads them.

    Raises:
        AdapterError: when pyreft has no such intervention or component.
    """
    import torch

    method, base = adapter.manifest.method, adapter.manifest.base
    if method not in TYPES:
        raise AdapterError(
            f"pyreft has no interventions that compute what method {method!r} does; it has {', '.join(TYPES)}"
        )
    config = parse_config(plugins.methods.get(method), adapter.manifest.config)
    if config.activation not in ACTIVATIONS:
        raise AdapterError(f"pyreft has no activation {config.activation!r}; it has {', '.join(ACTIVATIONS)}")
    units = sorted(units_in(adapter.tensors), key=lambda unit: (unit.group, unit.layer, unit.component))
    architecture = "" if base is None else base.architecture
    for unit in units:
        _check_component(unit, architecture)
    keys = [f"layer_{unit.layer}_comp_{unit.component}_unit_pos_nunit_1#{unit.group}" for unit in units]
    states = [_state(method, UnitTensors(unit, adapter.tensors)) for unit in units]
    sizes = [_sizes(method, UnitTensors(unit, adapter.tensors)) for unit in units]
    document = {
        "intervention_constant_sources": [True] * len(units),
        "intervention_dimensions": [width for _, width in sizes],
        "intervention_types": [f"<class 'pyreft.interventions.{TYPES[method]}'>"] * len(units),
        "mode": "parallel",
        "representations": [
            [unit.layer, unit.component, "pos", 1, rank, *[None] * 9]
            for unit, (rank, _) in zip(units, sizes, strict=True)
        ],
        "sorted_keys": keys,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for key, state in zip(keys, states, strict=True):
        torch.save(state, directory / f"intkey_{key}.bin")
    (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    return _notes(method, config)


def _check_component(unit: Unit, architecture: str) -> None:
    if unit.component not in _COMPONENTS:
        raise AdapterError(f"{unit}: pyreft has no name for {unit.component}; it has {', '.join(_COMPONENTS)}")
    if unit.component in ("attention_output", "mlp_output") and architecture.startswith(_NORM_IN_BRANCH):
        raise AdapterError(
            f"{unit}: in {architecture} pyreft's {unit.component} is in front of the norm that ends the sub-layer; "
            "this edit is behind it"
        )


def _sizes(method: str, tensors: UnitTensors) -> tuple[int, int]:
    """Rank and width of a unit."""
    rank, width = tensors["projection" if method in ("noreft", "direft") else "rotate"].shape
    return int(rank), int(width)


def _state(method: str, tensors: UnitTensors) -> dict[str, Tensor]:
    """The `state_dict` of pyreft's intervention."""
    import torch

    def bias(name: str) -> Tensor:
        found = tensors.get(name)
        return torch.zeros(_sizes(method, tensors)[0]) if found is None else found.contiguous()

    if method == "loreft":
        rotate = tensors["rotate"].T.contiguous()
        return {"weight": tensors["weight"].contiguous(), "bias": bias("bias"), "rotate_layer": rotate}
    state = {name: torch.tensor(_sizes(method, tensors)[1]) for name in ("embed_dim", "interchange_dim")}
    if method in ("noreft", "direft"):
        state["proj_layer.weight"] = tensors["projection"].contiguous()
        if tensors.get("projection_bias") is not None:
            state["proj_layer.bias"] = bias("projection_bias")
    else:
        original, square = orthogonal_state(tensors["rotate"].T)
        state["rotate_layer.parametrizations.weight.original"] = original
        state["rotate_layer.parametrizations.weight.0.base"] = square
    if method in ("consreft", "lobireft"):
        return {"learned_source": tensors["source"].contiguous(), **state}
    return {**state, "learned_source.weight": tensors["weight"].contiguous(), "learned_source.bias": bias("bias")}


def _notes(method: str, config: Any) -> list[str]:
    apart = len(config.groups) > 1
    notes = [
        f"pyreft does not store positions: give its data pipeline {config.positions!r}"
        + (" with share_weights=False" if apart else " with share_weights=True"),
    ]
    if config.activation != "identity":
        notes.append(
            "pyreft does not store the activation, and ReftModel.load leaves it out: build its interventions with "
            f"act_fn={ACTIVATIONS[config.activation]!r} and give each the state from its file"
        )
    if method in ("loreft", "direft_orthonormal"):
        notes.append(
            "ReftModel.load makes the learned map bfloat16, which a float32 base cannot run exactly: build the "
            "interventions with dtype=torch.float32 and give each the state from its file"
        )
    if method in ("noreft", "direft"):
        notes.append(
            "ReftModel.load of pyreft 0.1 fails on this kind (KeyError 'add_bias'): build its interventions with "
            "add_bias and dtype, and give each the state from its file"
        )
    return notes
