"""pyreft checkpoints made on the spot with torch's own orthogonal parametrisation, and what they compute, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

HIDDEN, RANK = 128, 3
State = dict[str, Tensor]


class Rotation(nn.Module):
    """pyreft's rotation: a `[hidden, rank]` weight."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, rank)))


def rotation(seed: int, width: int = HIDDEN, rank: int = RANK) -> nn.Module:
    """A parametrised rotation far from where it started, so that its stored pieces are not its weight."""
    torch.manual_seed(seed)
    module: nn.Module = orthogonal(Rotation(width, rank))
    original: Any = module.parametrizations.weight.original  # type: ignore[union-attr,index]
    with torch.no_grad():
        original.add_(torch.randn(original.shape).tril(-1) * 0.3)
    return module


def state(kind: str, seed: int, dtype: torch.dtype = torch.float32, old: bool = False) -> State:
    """The `state_dict` of an intervention of pyreft; `old` stores a LoReFT as before pyreft 0.0.5."""
    rotate = rotation(seed)
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(RANK, HIDDEN, generator=draw).to(dtype)
    bias = (torch.randn(RANK, generator=draw) * 10).to(dtype)
    weight_of_it: Any = rotate.weight
    if kind == "loreft" and not old:
        return {"weight": weight, "bias": bias, "rotate_layer": weight_of_it.detach()}
    sizes = {"embed_dim": torch.tensor(HIDDEN), "interchange_dim": torch.tensor(HIDDEN)}
    pieces = {f"rotate_layer.{name}": value for name, value in rotate.state_dict().items()}
    source = {"learned_source.weight": weight, "learned_source.bias": bias}
    if kind in ("consreft", "lobireft"):
        return {"learned_source": bias, **sizes, **pieces}
    if kind in ("noreft", "nodireft"):
        projection = {
            "proj_layer.weight": torch.randn(RANK, HIDDEN, generator=draw) * 0.1,
            "proj_layer.bias": torch.randn(RANK, generator=draw) * 10,
        }
        return {**sizes, **{name: value.to(dtype) for name, value in projection.items()}, **source}
    return {**sizes, **pieces, **source}


def computed(kind: str, seed: int, h: Tensor, act: Callable[[Tensor], Tensor], raw: State) -> Tensor:
    """What the intervention of `state(kind, seed)` makes of `h` `[hidden]`: pyreft's forward pass, written again."""
    rotate: Tensor = rotation(seed).weight.detach()  # type: ignore[assignment,union-attr,operator]
    if kind == "consreft":
        return h + (raw["learned_source"].float() - h @ rotate) @ rotate.T
    if kind == "lobireft":
        return h + raw["learned_source"].float() @ rotate.T
    prefix = "" if "weight" in raw else "learned_source."
    low = act(raw[f"{prefix}weight"].float() @ h + raw[f"{prefix}bias"].float())
    if kind == "loreft":
        return h + (low - h @ rotate) @ rotate.T
    if kind == "direft":
        return h + low @ rotate.T
    projection = raw["proj_layer.weight"].float()
    if kind == "nodireft":
        return h + low @ projection
    return h + (low - projection @ h - raw["proj_layer.bias"].float()) @ projection


def key(layer: int, count: int = 0, component: str = "block_output") -> str:
    return f"layer_{layer}_comp_{component}_unit_pos_nunit_1#{count}"


def path_key(path: str, count: int = 0) -> str:
    return f"comp_{path.replace('.', '_')}_unit_pos_nunit_1#{count}"


def write(directory: Path, interventions: Mapping[str, Any], kind: str | Sequence[str] | None = "loreft") -> Path:
    """A directory as `ReftModel.save` writes it; without `config.json` where `kind` is None."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, tensors in interventions.items():
        torch.save(tensors, directory / f"intkey_{name}.bin")
    if kind is not None:
        kinds = [kind] * len(interventions) if isinstance(kind, str) else kind
        types = [f"<class 'pyreft.interventions.{name.capitalize()}Intervention'>" for name in kinds]
        config = {"intervention_types": types, "sorted_keys": list(interventions), "mode": "parallel"}
        (directory / "config.json").write_text(json.dumps(config))
    return directory


Change = Callable[[Tensor], Tensor]


def by_hand(runtime: Any, tokens: list[int], work: Mapping[Any, Sequence[tuple[Change, Sequence[int]]]]) -> Any:
    """Logits with each change applied in order to the given tokens of a module's output.

    Args:
        work: changes by layer, or by a function from the model to the module.
    """

    def hook(changes: Sequence[tuple[Change, Sequence[int]]]) -> Any:
        def after(module: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for change, indices in changes:
                for index in indices:
                    hidden[0, index] = change(hidden[0, index])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return after

    model = runtime.model
    modules = [(model.model.layers[at] if isinstance(at, int) else at(model), work[at]) for at in work]
    handles = [module.register_forward_hook(hook(changes)) for module, changes in modules]
    try:
        with torch.inference_mode():
            return model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()


def change(kind: str, seed: int, act: Change = lambda x: x, **options: Any) -> Change:
    """`computed` of `state(kind, seed, **options)`, as a function of the representation."""
    raw = state(kind, seed, **options)
    return lambda h: computed(kind, seed, h, act, raw)
