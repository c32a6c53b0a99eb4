"""AdapterHub checkpoints made on the spot, and what the library computes with them, written again from its rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN, LAYERS = 128, 4
State = dict[str, Tensor]

BOTTLENECK: dict[str, Any] = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 16,
    "non_linearity": "relu",
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "phm_layer": False,
}
REFT: dict[str, Any] = {
    "architecture": "reft",
    "layers": "all",
    "prefix_positions": 3,
    "suffix_positions": 0,
    "r": 2,
    "orthogonality": True,
    "tied_weights": False,
    "non_linearity": None,
    "dropout": 0.0,
    "output_reft": True,
}
LORA: dict[str, Any] = {
    "architecture": "lora",
    "r": 2,
    "alpha": 6,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "use_gating": False,
    "use_dora": False,
}


def write(directory: Path, config: Any, tensors: State, head: State | None = None, **document: Any) -> Path:
    """A directory as `save_adapter` writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    full = {
        "config": config,
        "hidden_size": HIDDEN,
        "model_class": "LlamaForCausalLM",
        "model_name": "some/model",
        "model_type": "llama",
        "name": "task",
        "version": "adapters.1.3.0",
        **document,
    }
    (directory / "adapter_config.json").write_text(json.dumps(full))
    torch.save(tensors, directory / "pytorch_adapter.bin")
    if head is not None:
        torch.save(head, directory / "pytorch_model_head.bin")
    return directory


def bottleneck_state(config: Mapping[str, Any], size: Mapping[int, int], seed: int = 0, name: str = "task") -> State:
    """Tensors of `size[layer]` hidden units in the layers named there."""
    draw = torch.Generator().manual_seed(seed)
    found: State = {}
    branches = [("attention_adapters", "mh_adapter"), ("output_adapters", "output_adapter")]
    for layer, units in size.items():
        for module in (module for module, key in branches if config[key]):
            prefix = f"model.layers.{layer}.{module}.adapters.{name}"
            found[f"{prefix}.adapter_down.0.weight"] = torch.randn(units, HIDDEN, generator=draw) * 0.3
            found[f"{prefix}.adapter_down.0.bias"] = torch.randn(units, generator=draw)
            found[f"{prefix}.adapter_up.weight"] = torch.randn(HIDDEN, units, generator=draw) * 0.3
            found[f"{prefix}.adapter_up.bias"] = torch.randn(HIDDEN, generator=draw) * 0.3
            if config["scaling"] in ("learned", "channel"):
                shape = 1 if config["scaling"] == "learned" else HIDDEN
                found[f"{prefix}.scaling"] = torch.randn(shape, generator=draw) + 1
    return found


def bottleneck_rule(
    config: Mapping[str, Any], raw: State, x: Tensor, y: Tensor, act: Callable[[Tensor], Tensor]
) -> Any:
    """What the library returns in place of `x + y`, in a model that normalises in front of its sub-layers."""
    scaling = raw["scaling"] if "scaling" in raw else config["scaling"]

    def bottleneck(z: Tensor) -> Tensor:
        low = act(z @ raw["adapter_down.0.weight"].T + raw["adapter_down.0.bias"])
        up: Tensor = (low @ raw["adapter_up.weight"].T + raw["adapter_up.bias"]) * scaling
        return up

    if config["is_parallel"]:
        out = bottleneck(x) + y
    else:
        z = y + x if config["original_ln_before"] else y
        out = bottleneck(z) + (y if config["residual_before_ln"] is True else z)
    return out + x if config["original_ln_after"] else out


def below(tensors: State, prefix: str) -> State:
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
    }


Rule = Callable[[int, str, Tensor, Tensor], Tensor]


@contextmanager
def sublayers(model: Any, rule: Rule) -> Iterator[None]:
    """Inside, `rule(layer, branch, x, y)` stands in for `x + y` behind attention and behind the MLP of each layer."""
    handles = []
    for number, layer in enumerate(model.model.layers):
        streams: dict[str, Tensor] = {}

        def enter(module: Any, args: Any, kwargs: Any, s: dict[str, Tensor] = streams) -> None:
            s["attention"] = args[0] if args else kwargs["hidden_states"]

        def attention(module: Any, args: Any, output: Any, n: int = number, s: dict[str, Tensor] = streams) -> Any:
            s["mlp"] = rule(n, "attention", s["attention"], output[0])
            return (s["mlp"] - s["attention"], *output[1:])

        def mlp(module: Any, args: Any, output: Any, n: int = number, s: dict[str, Tensor] = streams) -> Any:
            return rule(n, "mlp", s["mlp"], output) - s["mlp"]

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(attention))
        handles.append(layer.mlp.register_forward_hook(mlp))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


BRANCHES = {"attention": ("attention_adapters", "mh_adapter"), "mlp": ("output_adapters", "output_adapter")}


def bottleneck_logits(
    runtime: Any, tokens: list[int], config: Mapping[str, Any], tensors: State, act: Callable[[Tensor], Tensor]
) -> Any:
    """Logits of the base with bottleneck adapters as the library applies them."""

    def rule(layer: int, branch: str, x: Tensor, y: Tensor) -> Tensor:
        module, key = BRANCHES[branch]
        raw = below(tensors, f"model.layers.{layer}.{module}.adapters.task")
        changed: Tensor = bottleneck_rule(config, raw, x, y, act) if config[key] and raw else x + y
        return changed

    with torch.inference_mode(), sublayers(runtime.model, rule):
        return runtime.model(input_ids=torch.tensor([tokens])).logits[0].numpy()


def reft_state(layers: list[int], units: int, rank: int, orthogonal: bool, seed: int = 0) -> tuple[State, State]:
    """Tensors as stored, and by `<layer>.<unit>.<name>` the effective `projection`, `weight` and `bias`."""
    torch.manual_seed(seed)
    stored: State = {}
    effective: State = {}
    for layer in layers:
        for unit in range(units):
            source = torch.nn.Linear(HIDDEN, rank)
            projection = torch.nn.Linear(HIDDEN, rank, bias=False)
            if orthogonal:
                projection = torch.nn.utils.parametrizations.orthogonal(projection)
                original: Any = projection.parametrizations.weight.original  # type: ignore[union-attr,index]
                with torch.no_grad():
                    original.add_(torch.randn(original.shape) * 0.3)
            with torch.no_grad():
                source.bias.add_(torch.randn(rank) * 8)
            prefix = f"model.layers.{layer}.reft_layer.refts.task.units.{unit}"
            stored |= {f"{prefix}.learned_source.{name}": t for name, t in source.state_dict().items()}
            stored |= {f"{prefix}.projection.{name}": t for name, t in projection.state_dict().items()}
            for name, value in (("projection", projection.weight), ("weight", source.weight), ("bias", source.bias)):
                effective[f"{layer}.{unit}.{name}"] = value.detach()
    return stored, effective


def reft_rule(
    config: Mapping[str, Any], effective: State, subtract: bool, layer: int, h: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """What a ReFT module makes of `h` `[tokens, hidden]`: both units read the given state, the suffix is set last."""

    def unit(number: int, x: Tensor) -> Tensor:
        projection = effective[f"{layer}.{number}.projection"]
        source = act(x @ effective[f"{layer}.{number}.weight"].T + effective[f"{layer}.{number}.bias"])
        return x + (source - x @ projection.T if subtract else source) @ projection

    first, last = config["prefix_positions"], config["suffix_positions"]
    changed = h.clone()
    if first:
        changed[:first] = unit(0, h[:first])
    if last:
        changed[-last:] = unit(0 if config["tied_weights"] else 1, h[-last:])
    return changed
