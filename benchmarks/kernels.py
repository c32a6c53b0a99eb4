"""What edits cost on a GPU, per layer of an 8B-shaped model, beside the layer's own products and beside LoRA.

    python benchmarks/kernels.py [--layers 32] [--rank 4] [--lora-rank 8] [--adapters 1 32 256] [--json FILE]

Edits of rank 4 after every layer, as launched from captured graphs, against the matrix products of a layer in bfloat16
and against LoRA of rank 8 on all its linear modules (shrink and expand kernels written as vLLM's). Every figure is the
median of graph replays, in microseconds per layer; parameters of other layers and adapters are other memory.
Before anything is timed, results are compared with plain products. Without a GPU the comparison runs in Triton's
interpreter, on a small shape, and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
from kernel_peers.lora import LoraBatch, reference  # noqa: E402
from torch import Tensor  # noqa: E402

from reft_plugins.positions import Positions  # noqa: E402
from reft_plugins.program import Edit, Site  # noqa: E402
from reft_vllm.execution import op  # noqa: E402
from reft_vllm.execution.plan import by_row, cut  # noqa: E402
from reft_vllm.execution.site import Site as Place  # noqa: E402
from reft_vllm.execution.state import EngineState  # noqa: E402
from reft_vllm.settings import Settings  # noqa: E402

REPLAYS = 30
LORA_LAYERS = 4


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder layer: hidden state, MLP, keys and values."""

    hidden: int = 4096
    inner: int = 14_336
    key_values: int = 1024

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Input and output of each product; merged ones are one."""
        query = self.hidden + 2 * self.key_values
        return [
            (self.hidden, query),
            (self.hidden, self.hidden),
            (self.hidden, 2 * self.inner),
            (self.inner, self.hidden),
        ]


@dataclass(frozen=True)
class Case:
    """A batch: `(tokens, computed)` of each request, all of the same prompt length, and which positions are edited."""

    name: str
    requests: int
    tokens: int
    computed: int
    prompt: int
    positions: str

    def columns(self, adapters: int) -> tuple[Any, ...]:
        def full(value: int) -> Any:
            return np.full(self.requests, value, np.int32)

        slot = (np.arange(self.requests) % adapters).astype(np.int32)
        return slot, full(self.tokens), full(self.computed), full(self.prompt)


CASES = [
    Case("decode 256, prompt edits", 256, 1, 200, 128, "f7+l7"),
    Case("decode 256, every token", 256, 1, 200, 128, "all"),
    Case("prefill 8192, f7+l7", 64, 128, 0, 128, "f7+l7"),
    Case("prefill 8192, every token", 64, 128, 0, 128, "all"),
]


class Edits:
    """Edits of one case and number of adapters, at a site per layer."""

    def __init__(self, shape: Shape, layers: int, rank: int, case: Case, adapters: int, dtype: torch.dtype) -> None:
        device = torch.device("cuda" if CUDA else "cpu")
        pages = adapters * layers * rank * 2 * shape.hidden * dtype.itemsize
        settings = Settings(pool_mib=(pages >> 20) + 8, stages=1)
        tokens = case.requests * case.tokens
        self.state = EngineState(adapters, tokens, device, dtype, settings, movable=False)
        self.names = [f"{layer}.block_output" for layer in range(layers)]
        for layer, name in enumerate(self.names):
            op.POINTS[name] = self.state, self.state.add_point(name, [Place(name, layer, "block_output")])
        self.hidden, self.residual = (torch.randn(tokens, shape.hidden, device=device, dtype=dtype) for _ in range(2))
        self.case = case
        for name in self.names:
            op.edit(self.hidden, self.residual, None, name)
        self.edits: list[list[Edit]] = []
        for slot in range(adapters):
            edits = [random_edit(layer, rank, shape.hidden, case.positions, device) for layer in range(layers)]
            self.state.load(slot, {name: [edit] for name, edit in zip(self.names, edits, strict=True)})
            self.edits.append(edits[:1])
        self.columns = case.columns(adapters)
        self.state.begin_step(*self.columns)

    def forward(self) -> None:
        for name in self.names:
            op.edit(self.hidden, self.residual, None, name)

    def check(self) -> None:
        """Compare the first layer with plain products.

        Raises:
            SystemExit: they differ.
        """
        changed = self.hidden.clone()
        op.edit(changed, self.residual, None, self.names[0])
        wanted, start = self.hidden.clone().float(), 0
        for slot, tokens, computed, prompt in zip(*self.columns, strict=True):
            edit = self.edits[slot][0]
            mask = torch.from_numpy(edit.positions.mask(np.arange(computed, computed + tokens), prompt))
            rows = start + mask.nonzero()[:, 0].to(self.hidden.device)
            start += tokens
            x = self.hidden[rows].float() + self.residual[rows].float()
            wanted[rows] += x @ edit.down.T.float() @ edit.up.float()
        compare("edits", changed, wanted, self.hidden, none=self.case.computed > self.case.prompt)


def random_edit(layer: int, rank: int, width: int, positions: str, device: torch.device) -> Edit:
    def values() -> Tensor:
        return (torch.randn(rank, width, device=device) / width**0.5).bfloat16().cpu()

    return Edit(Site(layer), Positions.parse(positions), down=values(), up=values() * 8)


class Loras:
    """LoRA on every linear module of a few layers, used in turn."""

    def __init__(self, shape: Shape, layers: int, rank: int, case: Case, adapters: int, dtype: torch.dtype) -> None:
        device = torch.device("cuda" if CUDA else "cpu")
        slot, tokens, *_ = case.columns(adapters)
        self.adapters = np.repeat(slot, tokens).astype(np.int64)
        ordered, distinct, starts, lengths = by_row(np.arange(len(self.adapters)), self.adapters)
        pieces = cut(lengths, 16)
        chunks = np.stack([distinct[pieces.owner], starts[pieces.owner] + pieces.offset, pieces.length], axis=1)
        self.batch = LoraBatch(*(torch.from_numpy(part.astype(np.int32)).to(device) for part in (chunks, ordered)))
        count, self.layers = len(self.adapters), layers

        def values(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype) / size[-1] ** 0.5

        self.inputs = {width: values(count, width) for width, _ in shape.linears}
        self.outputs = {width: values(count, width) for _, width in shape.linears}
        self.low = torch.zeros(count, rank, device=device)
        held = min(layers, LORA_LAYERS)
        self.weights = [
            [(values(adapters, rank, width), values(adapters, out, rank)) for width, out in shape.linears]
            for _ in range(held)
        ]

    def forward(self) -> None:
        for layer in range(self.layers):
            for a, b in self.weights[layer % len(self.weights)]:
                self.batch.add(self.inputs[a.shape[2]], a, b, self.outputs[b.shape[1]], self.low)

    def check(self) -> None:
        a, b = self.weights[0][0]
        x, y = self.inputs[a.shape[2]], self.outputs[b.shape[1]]
        changed = y.clone()
        self.batch.add(x, a, b, changed, self.low)
        adapters = torch.from_numpy(self.adapters).to(x.device)
        few = slice(0, 64)
        compare("lora", changed[few], reference(x[few], a, b, y[few], adapters[few]), y[few])


class Products:
    """The matrix products of layers, each with weights of its own as far as memory goes."""

    def __init__(self, shape: Shape, layers: int, tokens: int, dtype: torch.dtype) -> None:
        device = torch.device("cuda" if CUDA else "cpu")
        self.layers = layers
        self.inputs = {width: torch.randn(tokens, width, device=device, dtype=dtype) for width, _ in shape.linears}
        self.weights = [
            [torch.randn(width, out, device=device, dtype=dtype) for width, out in shape.linears]
            for _ in range(min(layers, LORA_LAYERS))
        ]

    def forward(self) -> None:
        for layer in range(self.layers):
            for weight in self.weights[layer % len(self.weights)]:
                self.inputs[weight.shape[0]] @ weight


def compare(what: str, changed: Tensor, wanted: Tensor, before: Tensor, none: bool = False) -> None:
    error, change = float((changed.float() - wanted).abs().max()), float((wanted - before.float()).abs().max())
    if error > 0.02 * max(1.0, float(wanted.abs().max())) or (change < 0.1) != none:
        sys.exit(f"{what}: differs from plain products by {error:.3g}, where the change is {change:.3g}")


def microseconds(forward: Callable[[], None], layers: int) -> float:
    """Median time of a layer, replayed from a graph that holds all layers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / layers)
    return statistics.median(times)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shape, found = Shape(), []
    for case in CASES:
        products = Products(shape, arguments.layers, case.requests * case.tokens, torch.bfloat16)
        base = microseconds(products.forward, arguments.layers)
        del products
        for adapters in arguments.adapters:
            figures: dict[str, Any] = {"case": case.name, "adapters": adapters, "products": base}
            for name, kind, rank in (("edits", Edits, arguments.rank), ("lora", Loras, arguments.lora_rank)):
                work: Any = kind(shape, arguments.layers, rank, case, adapters, torch.bfloat16)
                work.check()
                figures[name] = microseconds(work.forward, arguments.layers)
                del work
                torch.cuda.empty_cache()
            found.append(figures)
            print(figures, file=sys.stderr, flush=True)
    return found


def show(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"microseconds per layer, 8B shape, bfloat16, {torch.cuda.get_device_name()}")
    for name in ("batch", "adapters", "layer's products", "edits", "of the layer", "LoRA", "LoRA / edits"):
        table.add_column(name, justify="left" if name == "batch" else "right")
    for row in found:
        base, edits, lora = row["products"], row["edits"], row["lora"]
        parts = f"{base:.1f}", f"{edits:.1f}", f"{edits / base:.1%}", f"{lora:.1f}", f"{lora / edits:.1f}"
        table.add_row(row["case"], str(row["adapters"]), *parts)
    Console(width=120).print(table)


def check_in_interpreter() -> None:
    shape = Shape(hidden=80, inner=112, key_values=16)
    for positions, tokens in (("f2+l2", 9), ("all", 3), ("all", 1)):
        case = Case(positions, 4, tokens, 0, tokens, positions)
        for kind, rank in ((Edits, 4), (Loras, 8)):
            kind(shape, 2, rank, case, 3, torch.float32).check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    if not CUDA:
        check_in_interpreter()
        print("no GPU here: the kernels agree with plain products in Triton's interpreter; nothing was timed")
        return
    found = measure(arguments)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
