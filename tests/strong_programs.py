"""Strong random nodes and adapters of every kind for any base model: each changes most answers of a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel, identify, locate, read_config
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Node, Program, Site, VirtualTokens, WeightDelta

MAPS = ("direft", "noreft", "direft_orthonormal", "consreft", "loreft")


def linear_sizes(base: Path) -> dict[str, tuple[int, int]]:
    """`(out, in)` of the linear modules in the layers of a base model, by qualified name."""
    transposed = read_config(base)["model_type"] == "gpt2"
    sizes: dict[str, tuple[int, int]] = {}
    for file in locate(base).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(name).get_shape()
                if name.endswith(".weight") and len(shape) == 2 and any(part.isdigit() for part in name.split(".")):
                    sizes[name.removesuffix(".weight")] = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return sizes


class Strong:
    """Draws nodes and adapters for one base model.

    Args:
        base: folder; seed: of everything drawn; strength: of edits, relative to what suits the tiny Llama.
    """

    def __init__(self, base: Path, seed: int = 0, strength: float = 1.0) -> None:
        self.base, self.identity, self.strength = base, identify(base), strength
        self.sizes = linear_sizes(base)
        self.draw = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.draw)

    def orthonormal(self, rank: int, width: int) -> Tensor:
        """Orthonormal rows `[rank, width]`."""
        return torch.linalg.qr(self.normal(width, rank))[0].T.contiguous()

    def scales(self, width: int) -> Tensor:
        """Factors around one."""
        return 1 + 0.8 * self.normal(width)

    def adapter(self, *nodes: Node | Sequence[Node]) -> Adapter:
        """An adapter that is exactly these nodes."""
        flat = chain.from_iterable([node] if not isinstance(node, Sequence) else node for node in nodes)
        return adapter_of(Program(tuple(flat)), self.identity)

    def width(self, layer: int, component: str) -> int:
        """Elements of a component."""
        inputs = {"attention_value_output": ("o_proj", "out_proj"), "mlp_activation": ("down_proj", "fc2")}
        if component not in inputs:
            return self.identity.hidden_size
        (module,) = self.modules(*inputs[component], layers=(layer,))
        return self.sizes[module][1]

    def modules(self, *names: str, layers: Sequence[int] | None = None) -> list[str]:
        """Qualified names of the linear modules with these last names."""
        return [
            module
            for module in self.sizes
            if module.rpartition(".")[2] in names
            and (layers is None or any(f".{layer}." in module for layer in layers))
        ]

    def low_rank(
        self,
        layer: int,
        positions: str,
        component: str = "block_output",
        rank: int = 4,
        strength: float = 1.0,
        **fields: Any,
    ) -> Edit:
        """A low-rank edit with a bias; `fields` are further ones of `Edit`."""
        width, strength = self.width(layer, component), strength * self.strength
        return Edit(
            Site(layer, component),
            Positions.parse(positions),
            down=self.normal(rank, width) * 0.1,
            up=self.orthonormal(rank, width) * 3 * strength,
            bias=self.normal(rank),
            **fields,
        )

    def element_wise(self, layer: int, positions: str, component: str = "block_output", strength: float = 1.0) -> Edit:
        """A scale and a shift."""
        width = self.width(layer, component)
        return Edit(
            Site(layer, component),
            Positions.parse(positions),
            scale=self.scales(width),
            shift=self.normal(width) * 0.3 * strength * self.strength,
        )

    def lora(self, module: str, rank: int = 4, strength: float = 1.0, positions: str = "all") -> WeightDelta:
        """A low-rank delta."""
        outputs, inputs = self.sizes[module]
        a, b = self.normal(rank, inputs) * 0.2, self.normal(outputs, rank) * 0.2 * strength
        return WeightDelta(module, a=a, b=b, scaling=1.5, positions=Positions.parse(positions))

    def dora(self, module: str, rank: int = 4, bias: bool = False) -> WeightDelta:
        """A low-rank delta with learned row norms, and with `bias` a learned bias."""
        plain = self.lora(module, rank)
        weight = BaseModel.open(self.base).tensor(f"{module}.weight").float()
        norms = weight.norm(dim=1) * (0.5 + torch.rand(len(weight), generator=self.draw))
        extra = self.normal(len(weight)) * 0.2 if bias else None
        return WeightDelta(module, a=plain.a, b=plain.b, scaling=plain.scaling, magnitude=norms, bias=extra)

    def virtual_tokens(self, count: int) -> VirtualTokens:
        """Embeddings in front of the prompt."""
        return VirtualTokens(self.normal(count, self.identity.hidden_size))

    def prefixes(self, count: int, gated: bool = False, projected: bool = True) -> list[KeyValuePrefix]:
        """Pairs of keys and values of every layer."""
        config = read_config(locate(self.base))
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return [
            KeyValuePrefix(
                layer,
                self.normal(count, heads, size) * 1.5,
                self.normal(count, heads, size),
                self.normal(config["num_attention_heads"]) * 2 if gated else None,
                projected,
            )
            for layer in range(config["num_hidden_layers"])
        ]

    def of_method(
        self, method: str, positions: str, layers: Sequence[int], component: str = "block_output", **config: Any
    ) -> Adapter:
        """An adapter of one of the methods that edit representations."""
        rank = {"rank": 4} if method in MAPS else {}
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            for group in range(1 if config.get("shared", True) else len(Positions.parse(positions).parts())):
                drawn = self._unit(method, self.width(layer, component))
                tensors.update({f"layers.{layer}.{component}.{group}.{name}": drawn[name] for name in drawn})
        settings = {**rank, "layers": tuple(layers), "positions": positions, "component": component, **config}
        return Adapter.create(method, settings, tensors, self.identity)

    def bottleneck(self, layers: Sequence[int], sites: dict[str, str], positions: str, activation: str) -> Adapter:
        """A bottleneck adapter that writes the keys of `sites` and reads their values."""
        tensors: dict[str, Tensor] = {}
        for unit in (f"layers.{layer}.{component}" for layer in layers for component in sites):
            tensors[f"{unit}.down"] = self.normal(6, self.identity.hidden_size) * 0.1
            tensors[f"{unit}.up"] = self.normal(6, self.identity.hidden_size) * 0.4 * self.strength
            tensors[f"{unit}.down_bias"] = self.normal(6)
            tensors[f"{unit}.up_bias"] = self.normal(self.identity.hidden_size) * 0.3 * self.strength
        settings = {"placement": sites, "bottleneck_size": 6, "activation": activation, "scaling": 1.5}
        return Adapter.create(
            "bottleneck", {**settings, "layers": tuple(layers), "positions": positions}, tensors, self.identity
        )

    def weights(self, method: str, modules: Sequence[str], **config: Any) -> Adapter:
        """LoRA with `use_dora` or `use_rslora` as asked, or IA3, on modules."""
        tensors: dict[str, Tensor] = {}
        for module in modules:
            outputs, inputs = self.sizes[module]
            if method == "ia3":
                feed_forward = module.rpartition(".")[2] in config["feedforward_modules"]
                name, size = ("input_scale", inputs) if feed_forward else ("output_scale", outputs)
                tensors[f"{module}.{name}"] = self.scales(size)
                continue
            tensors[f"{module}.lora_A"] = self.normal(8, inputs) * 0.1
            tensors[f"{module}.lora_B"] = self.normal(outputs, 8) * 0.1
            if config.get("use_dora"):
                magnitude = self.dora(module).magnitude
                assert magnitude is not None
                tensors[f"{module}.magnitude"] = magnitude
        settings = {"rank": 8, "alpha": 16.0} if method == "lora" else {}
        return Adapter.create(method, {**settings, **config}, tensors, self.identity)

    def _unit(self, method: str, width: int) -> dict[str, Tensor]:
        strength = self.strength
        drawn: dict[str, Callable[[], Tensor]] = {
            "rotate": lambda: self.orthonormal(4, width),
            "projection": lambda: self.orthonormal(4, width) * 2,
            "projection_bias": lambda: self.normal(4) * strength,
            "weight": lambda: self.normal(4, width) * 0.3,
            "bias": lambda: self.normal(4) * 3 * strength,
            "source": lambda: self.normal(4) * 4 * strength,
            "scale": lambda: self.scales(width),
            "shift": lambda: self.normal(width) * strength,
            "vector": lambda: self.normal(width) * 2 * strength,
        }
        names = {
            "loreft": ("rotate", "weight", "bias"),
            "direft": ("projection", "weight", "bias"),
            "noreft": ("projection", "projection_bias", "weight", "bias"),
            "direft_orthonormal": ("rotate", "weight", "bias"),
            "consreft": ("rotate", "source"),
            "red": ("scale", "shift"),
            "steering": ("vector",),
        }
        return {name: drawn[name]() for name in names[method]}
