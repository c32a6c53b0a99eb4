"""Programs of every kind that weights hold exactly, strong enough to change most predictions, for any small base."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reft_plugins.program import ALL, Edit, Node, Site, WeightDelta

EMBEDDING, HEAD, LAYERS = "model.embed_tokens", "lm_head", 4


@dataclass
class Maker:
    """Random parameters for the modules of a base, always the same for one name.

    Attributes:
        weights: of the base, by the names in its checkpoint.
    """

    weights: Mapping[str, Tensor]
    _draws: torch.Generator = field(default_factory=torch.Generator)

    def seeded(self, name: str) -> Maker:
        """This maker, at the beginning of its numbers for `name`."""
        self._draws.manual_seed(zlib.crc32(name.encode()))
        return self

    def random(self, *shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._draws) * size

    @property
    def hidden(self) -> int:
        return self.weights["model.norm.weight"].shape[0]

    def weight(self, module: str) -> Tensor:
        tied = module == HEAD and f"{HEAD}.weight" not in self.weights
        return self.weights[f"{EMBEDDING if tied else module}.weight"]

    def linear(self, *endings: str) -> list[str]:
        """Linear modules of all layers, with one of these endings; those that are fused (Phi-3) are there once."""
        fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
        fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
        wanted = {*endings, *(fused.get(ending, "") for ending in endings)}
        modules = (name.removesuffix(".weight") for name in self.weights if name.endswith("_proj.weight"))
        return [name for name in sorted(modules) if not endings or name.rpartition(".")[2] in wanted]

    def low_rank(self, module: str, size: float = 1.0, rank: int = 4) -> dict[str, Tensor]:
        """`a` and `b` of a change about as large as the weight, times `size`."""
        weight = self.weight(module)
        out, inside = weight.shape if module != EMBEDDING else weight.T.shape
        scale = size * float(weight.std()) / rank**0.5
        return {"a": self.random(rank, inside), "b": self.random(out, rank, size=scale)}

    def spread(self, size: int, around: float = 1.0, by: float = 0.4) -> Tensor:
        return around + self.random(size, size=by)

    def affine(self, width: int, rank: int = 3, size: float = 1.0) -> dict[str, Tensor]:
        """`down`, `bias` and `up` of an edit that changes a state by about `size` of it."""
        return {
            "down": self.random(rank, width, size=width**-0.5),
            "bias": self.random(rank),
            "up": self.random(rank, width, size=size / rank**0.5),
        }

    def width(self, ending: str) -> int:
        """What a linear module reads."""
        return int(self.weight(self.linear(ending)[0]).shape[1])


def lora(make: Maker) -> list[Node]:
    return [WeightDelta(name, scaling=0.5, **make.low_rank(name)) for name in make.linear()]


def dora(make: Maker) -> list[Node]:
    return [
        WeightDelta(
            name,
            **make.low_rank(name, 0.5),
            magnitude=make.weight(name).norm(dim=1) * make.spread(len(make.weight(name))),
        )
        for name in make.linear()
    ]


def ia3(make: Maker) -> list[Node]:
    inputs = [
        WeightDelta(name, input_scale=make.spread(make.weight(name).shape[1])) for name in make.linear("down_proj")
    ]
    outputs = make.linear("k_proj", "v_proj")
    return [*inputs, *(WeightDelta(name, output_scale=make.spread(len(make.weight(name)))) for name in outputs)]


def biases(*endings: str) -> Callable[[Maker], list[Node]]:
    def build(make: Maker) -> list[Node]:
        return [WeightDelta(name, bias=make.random(len(make.weight(name)), size=0.7)) for name in make.linear(*endings)]

    return build


def replaced(make: Maker) -> list[Node]:
    """Full fine-tuning of some modules of every kind."""
    nodes: list[Node] = []
    for name in (*make.linear("q_proj", "down_proj")[:4], "model.layers.1.input_layernorm", "model.norm"):
        weight = make.weight(name)
        nodes.append(WeightDelta(name, new_weight=weight + make.random(*weight.shape, size=0.5 * float(weight.std()))))
    return nodes


def head(make: Maker) -> list[Node]:
    weight = make.weight(HEAD)
    trained = weight + make.random(*weight.shape, size=0.3 * float(weight.std()))
    return [WeightDelta(HEAD, new_weight=trained), WeightDelta(HEAD, **make.low_rank(HEAD, 0.5))]


def embeddings(make: Maker) -> list[Node]:
    """Of a tied model too, whose output layer keeps them as they were."""
    return [
        WeightDelta(EMBEDDING, **make.low_rank(EMBEDDING), output_scale=make.spread(make.hidden)),
        WeightDelta(EMBEDDING, bias=make.random(make.hidden, size=0.5)),
    ]


def embedding_magnitudes(make: Maker) -> list[Node]:
    columns = make.weight(EMBEDDING).norm(dim=0)
    return [WeightDelta(EMBEDDING, **make.low_rank(EMBEDDING, 0.5), magnitude=columns * make.spread(make.hidden))]


def norms(make: Maker) -> list[Node]:
    names = [name.removesuffix(".weight") for name in make.weights if name.endswith("norm.weight")]
    return [WeightDelta(name, output_scale=make.spread(len(make.weight(name)))) for name in sorted(names)]


def several_deltas(make: Maker) -> list[Node]:
    """Deltas of one module in program order; Gemma and Qwen3 take biases of these modules too."""
    nodes: list[Node] = []
    for name in make.linear("q_proj", "v_proj")[::2]:
        out, inside = make.weight(name).shape
        nodes += [
            WeightDelta(name, input_scale=make.spread(inside, by=0.2)),
            WeightDelta(name, **make.low_rank(name, 0.3), bias=make.random(out, size=0.5)),
            WeightDelta(name, **make.low_rank(name, 0.3), magnitude=make.weight(name).norm(dim=1) * make.spread(out)),
            WeightDelta(name, output_scale=make.spread(out), bias=make.random(out, size=0.5)),
        ]
    return nodes


def vectors_between_layers(make: Maker) -> list[Node]:
    zero = torch.zeros(2, make.hidden)
    act = Edit(Site(1), ALL, down=zero, up=make.random(2, make.hidden), bias=make.random(2), activation="gelu_tanh")
    sites = [Site(0), Site(2, "block_input"), Site(3, "attention_residual"), Site(3)]
    return [*(Edit(site, ALL, shift=make.random(make.hidden)) for site in sites), act]


def vectors_inside_layers(make: Maker) -> list[Node]:
    sites = [Site(0, "attention_output"), Site(1, "mlp_residual"), Site(1, "mlp_output"), Site(3, "mlp_residual")]
    return [Edit(site, ALL, shift=make.random(make.hidden)) for site in sites]


def affine_outputs(make: Maker) -> list[Node]:
    """Simultaneous and sequential, with what is added to the stream afterwards."""
    nodes: list[Node] = []
    for component in ("attention_output", "mlp_output"):
        for layer in (0, 2):
            site, width = Site(layer, component), make.hidden
            nodes += [
                Edit(site, ALL, **make.affine(width)),
                Edit(site, ALL, **make.affine(width, 2), shift=make.random(width)),
                Edit(site, ALL, scale=make.spread(width), simultaneous=True),
            ]
    return [*nodes, Edit(Site(2), ALL, shift=make.random(make.hidden))]


def scaled_outputs(make: Maker) -> list[Node]:
    """RED on the outputs of attention and of MLPs."""
    sites = [Site(layer, name) for layer in range(LAYERS) for name in ("attention_output", "mlp_output")]
    return [Edit(site, ALL, scale=make.spread(make.hidden), shift=make.random(make.hidden, size=0.3)) for site in sites]


def inputs(constant: bool) -> Callable[[Maker], list[Node]]:
    """Affine edits of what output projections read, and a delta of the same modules, which reads what they leave."""

    def build(make: Maker) -> list[Node]:
        nodes: list[Node] = []
        for component, ending in (("attention_value_output", "o_proj"), ("mlp_activation", "down_proj")):
            for layer in (1, 3):
                width, site = make.width(ending), Site(layer, component)
                edit: dict[str, Any] = make.affine(width)
                if constant:
                    edit["shift"] = make.random(width)
                else:
                    del edit["bias"]
                nodes += [Edit(site, ALL, **edit), Edit(site, ALL, scale=make.spread(width))]
            name = make.linear(ending)[1]
            nodes.append(WeightDelta(name, **make.low_rank(name, 0.5)))
        return nodes

    return build


def affine_embeddings(make: Maker) -> list[Node]:
    site = Site(0, "block_input")
    return [Edit(site, ALL, **make.affine(make.hidden)), Edit(site, ALL, scale=make.spread(make.hidden))]


def vector_at_embeddings(make: Maker) -> list[Node]:
    return [Edit(Site(0, "block_input"), ALL, shift=make.random(make.hidden))]


def together(make: Maker) -> list[Node]:
    """Kinds that every architecture has, in one adapter, the modules that several of them touch included."""
    return [
        *vectors_between_layers(make),
        *lora(make),
        *scaled_outputs(make)[:3],
        *inputs(constant=False)(make),
        *biases("q_proj", "v_proj")(make),
        *vectors_inside_layers(make),
        *norms(make)[::3],
    ]


PROGRAMS: dict[str, Callable[[Maker], list[Node]]] = {
    "low rank": lora,
    "magnitudes (DoRA)": dora,
    "scales (IA3)": ia3,
    "biases of queries, keys and values": biases("q_proj", "k_proj", "v_proj"),
    "biases of output projections": biases("o_proj", "down_proj"),
    "biases of gates": biases("gate_proj"),
    "replaced weights": replaced,
    "output layer": head,
    "embeddings": embeddings,
    "magnitudes of embeddings": embedding_magnitudes,
    "norms": norms,
    "several deltas of one module": several_deltas,
    "vectors between layers": vectors_between_layers,
    "vectors inside layers": vectors_inside_layers,
    "affine edits of outputs": affine_outputs,
    "scales and shifts of outputs (RED)": scaled_outputs,
    "affine edits of inputs": inputs(constant=True),
    "linear edits of inputs": inputs(constant=False),
    "affine edit of the embeddings": affine_embeddings,
    "vector at the embeddings": vector_at_embeddings,
    "all together": together,
}
