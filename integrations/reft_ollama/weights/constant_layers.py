"""Vectors added to the residual stream by models whose files have no place for them: layers of their own.

Qwen3 and Gemma have no bias at the output of attention or of the MLP, and llama.cpp refuses a file that has one. A
layer inserted behind the edited one adds the vector instead, in one of the ways of `reft_ollama.weights.adding`. A
vector between attention and MLP splits its layer in two, of which one half of one adds it.

Engines know by heart which layers of Gemma see the whole text, by counting: every second or sixth. So that the count
stays right, a vector behind any layer but the last costs as many layers as that pattern is long, all but one of them
idle.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.weights.adding import adding
from reft_ollama.weights.layer_origins import Origin, arrange, in_layer, pattern_length, source
from reft_ollama.weights.stack import Blocks, Shapes, Weights, blocks
from reft_plugins.errors import UnsupportedProgramError


class ConstantLayers:
    """A model that adds vectors to its residual stream; see this module's description and `Weights`.

    Biases at the output of attention and of the MLP, where the file has no place for them, are such vectors too.

    Args:
        after: vectors `[hidden]` by the layer whose output they are added to, -1 for the embeddings.
        inside: by the layer to whose residual stream they are added between attention and MLP.

    Raises:
        UnsupportedProgramError: the MLP has too few neurons.
    """

    def __init__(
        self,
        weights: Weights,
        architecture: Architecture,
        after: Mapping[int, Tensor] | None = None,
        inside: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._weights, self._architecture = weights, architecture
        self._vectors = {False: dict(after or {}), True: dict(inside or {})}
        self._count = int(weights.config.num_hidden_layers)
        self._biased = set() if architecture.output_bias else self._find_biases()
        self.config, self.shapes = weights.config, weights.shapes
        self._origins: list[Origin] = []
        self._modules: dict[str, tuple[Origin, str]] = {}
        if not self._biased and not any(self._vectors.values()):
            return
        self._adding = adding(architecture)
        if not self._adding.fits(weights.config):
            raise UnsupportedProgramError(
                "base model: a vector is added by two MLP neurons per channel, but there are "
                f"{weights.config.intermediate_size} for {weights.config.hidden_size} channels. "
                "Serve the adapter with vLLM instead (reft serve)"
            )
        behind, between = (
            {layer for layer, middle in self._biased if middle is where} | set(self._vectors[where])
            for where in (False, True)
        )
        self._origins = arrange(weights.config, behind, between, self._adding.in_attention)
        self.config = copy.deepcopy(weights.config)
        self.config.num_hidden_layers = len(self._origins)
        self.config.layer_origins = self._origins
        types = getattr(weights.config, "layer_types", None)
        if types is not None:
            period = pattern_length(types)
            self.config.layer_types = [
                types[index % period if origin.attention is None else origin.attention]
                for index, origin in enumerate(self._origins)
            ]
        self.shapes = self._make_shapes()

    @property
    def warnings(self) -> list[str]:
        """What the vectors cost."""
        layers = int(self.config.num_hidden_layers) - self._count
        if not layers:
            return []
        numbers = 0
        for name, shape in self.shapes.items():
            origin, part = self._modules.get(name.rpartition(".")[0], (None, ""))
            if origin is not None and source(origin, part, self._architecture) is None:
                numbers += torch.Size(shape).numel()
        return [
            f"files of this architecture have no biases for the vectors that the adapter adds: the model grew by "
            f"{layers} layer{'s' * (layers > 1)} for them, {numbers * 2 / 1e6:.3g} MB in 16 bits",
            *([self._adding.needs] if self._adding.needs else []),
        ]

    def module(self, name: str) -> dict[str, Tensor]:
        """See `Weights`."""
        if name not in self._modules:
            return self._weights.module(name)
        origin, part = self._modules[name]
        layer = source(origin, part, self._architecture)
        if layer is not None:
            own = self._weights.module(self._name(layer, part))
            return {kind: own[kind] for kind in own if f"{name}.{kind}" in self.shapes}
        kinds = [kind for kind in ("weight", "bias") if f"{name}.{kind}" in self.shapes]
        return {kind: self._made(origin, part, kind, self.shapes[f"{name}.{kind}"]) for kind in kinds}

    def blocks(self, name: str) -> Blocks:
        """See `reft_ollama.weights.stack.Streamed`."""
        if name not in self._modules:
            return blocks(self._weights, name)
        origin, part = self._modules[name]
        layer = source(origin, part, self._architecture)
        if layer is None:
            return {kind: (tensor,) for kind, tensor in self.module(name).items()}
        own = blocks(self._weights, self._name(layer, part))
        return {kind: own[kind] for kind in own if f"{name}.{kind}" in self.shapes}

    def _made(self, origin: Origin, part: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter of an inserted layer."""
        norm = kind == "weight" and len(shape) == 1
        made = torch.ones(shape) if norm else torch.zeros(shape)
        name = self._architecture.part_of(f".{part}")
        if origin.constant is not None and name in self._adding.parts:
            made = self._adding.fill(name, kind, made, self._vector(origin))
        return made - self._architecture.norm_offset if norm else made

    def _vector(self, origin: Origin) -> Tensor:
        """The vector that a layer adds, float32 `[hidden]`: zero in channels that the model was given since."""
        assert origin.constant is not None
        total = torch.zeros(self.config.hidden_size, dtype=torch.float64)
        given = self._vectors[origin.inside].get(origin.constant)
        if given is not None:
            total[: len(given)] += given.double()
        if (origin.constant, origin.inside) in self._biased:
            total += self._weights.module(self._output(origin.constant, origin.inside))["bias"].double()
        return total.float()

    def _find_biases(self) -> set[tuple[int, bool]]:
        return {
            (layer, inside)
            for layer in range(self._count)
            for inside in (False, True)
            if f"{self._output(layer, inside)}.bias" in self._weights.shapes
        }

    def _output(self, layer: int, attention: bool) -> str:
        return self._architecture.module(layer, "attention_output" if attention else "mlp_output")

    def _make_shapes(self) -> Shapes:
        """Those of the model before, with the layers' in the new order where the first of them were."""
        own: dict[int, Shapes] = {}
        for name, shape in self._weights.shapes.items():
            index, rest = in_layer(name, self._architecture)
            if index is not None:
                own.setdefault(index, {})[rest] = shape
        shapes: Shapes = {}
        for name, shape in self._weights.shapes.items():
            if in_layer(name, self._architecture)[0] is None:
                shapes[name] = shape
            elif not self._modules:
                for index, origin in enumerate(self._origins):
                    shapes |= self._layer_shapes(index, origin, own)
        return shapes

    def _layer_shapes(self, index: int, origin: Origin, own: Mapping[int, Shapes]) -> Shapes:
        found: Shapes = {}
        for rest in dict.fromkeys(rest for layer in own.values() for rest in layer if rest.endswith(".weight")):
            part = rest.removesuffix(".weight")
            name, layer = self._name(index, part), source(origin, part, self._architecture)
            self._modules[name] = (origin, part)
            if layer is not None:
                kinds = [kind for kind in ("weight", "bias") if f"{part}.{kind}" in own[layer]]
                dropped = ["bias"] if self._drops_bias(layer, part) else []
                found |= {f"{name}.{kind}": own[layer][f"{part}.{kind}"] for kind in kinds if kind not in dropped}
                continue
            shape = next(shapes[rest] for shapes in own.values() if rest in shapes)
            found[f"{name}.weight"] = shape
            if origin.constant is not None and self._architecture.part_of(f".{part}") == self._adding.biased:
                found[f"{name}.bias"] = shape[:1]
        return found

    def _drops_bias(self, layer: int, part: str) -> bool:
        outputs = {"attention_output": True, "mlp_output": False}
        kind = self._architecture.part_of(f".{part}")
        return kind in outputs and (layer, outputs[kind]) in self._biased

    def _name(self, layer: int, part: str) -> str:
        return f"{self._architecture.layer.format(layer)}.{part}"
