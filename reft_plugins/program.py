"""What an adapter does, free of how it was learned: four kinds of node that every runtime executes.

Methods lower to these nodes (`Method.lower`); runtimes and exporters know nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.positions import Positions

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.manifest import BaseModelIdentity

COMPONENTS = (
    "block_input",
    "attention_output",
    "attention_residual",
    "attention_value_output",
    "mlp_activation",
    "mlp_output",
    "mlp_residual",
    "block_output",
)
"""Names of the places in a decoder layer, pre-norm naming; `block_output` is the residual stream after the layer."""

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "elu")
"""Element-wise functions an `Edit` may apply in its low-rank space, by the field's names."""

ALL = Positions.parse("all")


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model: decoder layer (global index from 0) and component."""

    layer: int
    component: str = "block_output"

    def __str__(self) -> str:
        return f"layer {self.layer} {self.component}"


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """`h <- h * scale + act(x @ down.T + bias) @ up + shift` at `site`, on the tokens of `positions`.

    `x` is `h` itself unless `reads` names another component of the same layer. Edits of one site run in program order,
    each reading the output of the one before (pyreft); with `simultaneous` an edit reads the state that the edit before
    it read, and its change is added (AdapterHub, stacked subspaces).

    Attributes:
        down, up: `[rank, hidden]`, both or neither; bias: `[rank]`.
        scale, shift: `[hidden]`.
        activation: one of `ACTIVATIONS`.
        dropout: probability with which training zeroes elements of the edited representation (pyreft applies it there);
            nothing outside training.
    """

    site: Site
    positions: Positions
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "identity"
    reads: str | None = None
    simultaneous: bool = False
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """Rows of `down`; 0 for a constant or purely scaling edit."""
        return 0 if self.down is None else int(self.down.shape[0])

    def __str__(self) -> str:
        return f"Edit({self.site}, positions {self.positions}, rank {self.rank})"


@dataclass(frozen=True, slots=True, eq=False)
class WeightDelta:
    """`W <- magnitude * (W + scaling * b @ a) / |row|`, then `y = output_scale * (W (input_scale * x)) + bias`.

    Attributes:
        module: qualified name of a linear module in the base model, transformers naming.
        a: `[rank, in]`, b: `[out, rank]`, both or neither.
        magnitude: `[out]`, the learned row norms of DoRA (arXiv:2402.09353 eq. 5); None leaves rows as they are.
        bias: `[out]`, added to the output.
        input_scale: `[in]`; output_scale: `[out]` (IA3, arXiv:2205.05638).
        positions: tokens the change applies to; anything but `all` cannot be merged.
    """

    module: str
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    positions: Positions = field(default=ALL)

    @property
    def rank(self) -> int:
        """Rows of `a`; 0 where only scales or a bias change."""
        return 0 if self.a is None else int(self.a.shape[0])

    @property
    def plain(self) -> bool:
        """True for what LoRA kernels execute: `scaling * b @ a` on every token and nothing else."""
        extras = (self.magnitude, self.bias, self.input_scale, self.output_scale)
        return self.a is not None and self.positions.everywhere and all(extra is None for extra in extras)

    def __str__(self) -> str:
        return f"WeightDelta({self.module}, rank {self.rank})"


@dataclass(frozen=True, slots=True, eq=False)
class VirtualTokens:
    """Learned embeddings `[n, hidden]` in front of the prompt."""

    embeddings: Tensor

    def __str__(self) -> str:
        return f"VirtualTokens({self.embeddings.shape[0]})"


@dataclass(frozen=True, slots=True, eq=False)
class KeyValuePrefix:
    """Learned keys and values `[n, kv_heads, head_dim]` of one layer, used as they are (no rotary embedding).

    In the same softmax as the real keys; with `gate` in a softmax of its own whose result is multiplied by it and
    added (LLaMA-Adapter, arXiv:2303.16199 eq. 6).
    """

    layer: int
    keys: Tensor
    values: Tensor
    gate: Tensor | None = None

    def __str__(self) -> str:
        return f"KeyValuePrefix(layer {self.layer}, {self.keys.shape[0]} pairs)"


Node = Edit | WeightDelta | VirtualTokens | KeyValuePrefix


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """An ordered tuple of nodes: all that an adapter does to its base model."""

    nodes: tuple[Node, ...]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The `Edit` nodes in order."""
        return tuple(node for node in self.nodes if isinstance(node, Edit))

    @property
    def weight_deltas(self) -> tuple[WeightDelta, ...]:
        """The `WeightDelta` nodes in order."""
        return tuple(node for node in self.nodes if isinstance(node, WeightDelta))

    @property
    def max_rank(self) -> int:
        """The largest rank of any edit or weight delta, at least 1."""
        return max([1, *(edit.rank for edit in self.edits), *(delta.rank for delta in self.weight_deltas)])

    def validate(self, base: BaseModelIdentity | None = None) -> None:
        """Check shapes, names and, where the base is known, layers and widths.

        Raises:
            AdapterError: naming the node and what does not fit.
        """
        for node in self.nodes:
            if isinstance(node, Edit):
                _validate_edit(node, base)
            elif isinstance(node, WeightDelta):
                _validate_weight_delta(node)


def _validate_edit(edit: Edit, base: BaseModelIdentity | None) -> None:
    for component in (edit.site.component, edit.reads or edit.site.component):
        if component not in COMPONENTS:
            raise AdapterError(f"{edit.site}: unknown component {component!r}; known are {', '.join(COMPONENTS)}")
    if edit.activation not in ACTIVATIONS:
        raise AdapterError(f"{edit.site}: unknown activation {edit.activation!r}; known are {', '.join(ACTIVATIONS)}")
    if (edit.down is None) != (edit.up is None) or (edit.bias is not None and edit.down is None):
        raise AdapterError(f"{edit.site}: down, up and bias belong together")
    widths = {t.shape[-1] if t.ndim else 0 for t in (edit.down, edit.up, edit.scale, edit.shift) if t is not None}
    if len(widths) != 1 or 0 in widths:
        raise AdapterError(f"{edit.site}: one hidden size is needed, its tensors have {sorted(widths) or 'none'}")
    width, rank = int(widths.pop()), int(edit.down.shape[0]) if edit.down is not None else 0
    if edit.down is not None and not rank:
        raise AdapterError(f"{edit.site}: rank 0 edits nothing")
    for name, tensor, shape in (
        ("up", edit.up, [rank, width]),
        ("down", edit.down, [rank, width]),
        ("bias", edit.bias, [rank]),
        ("scale", edit.scale, [width]),
        ("shift", edit.shift, [width]),
    ):
        _validate_tensor(str(edit.site), name, tensor, shape)
    if base is None:
        return
    if not 0 <= edit.site.layer < base.num_hidden_layers:
        raise AdapterError(
            f"{edit}: layer {edit.site.layer} is outside the base model {base.name}, "
            f"which has layers 0 to {base.num_hidden_layers - 1}"
        )
    if edit.site.component != "mlp_activation" and width != base.hidden_size:
        raise AdapterError(f"{edit}: made for hidden size {width}, the base model has {base.hidden_size}")
    if rank > base.hidden_size:
        raise AdapterError(f"{edit}: rank {rank} exceeds the base model's hidden size {base.hidden_size}")


def _validate_weight_delta(delta: WeightDelta) -> None:
    where = f"module {delta.module}"
    if not math.isfinite(delta.scaling):
        raise AdapterError(f"{where}: scaling is {delta.scaling}")
    outputs = inputs = None
    if (delta.a is None) != (delta.b is None):
        raise AdapterError(f"{where}: a and b belong together")
    if delta.a is not None and delta.b is not None:
        if delta.a.ndim != 2 or delta.b.ndim != 2 or delta.a.shape[0] != delta.b.shape[1]:
            raise AdapterError(
                f"{where}: a {list(delta.a.shape)} and b {list(delta.b.shape)} do not multiply to [out, in]"
            )
        outputs, inputs = delta.b.shape[0], delta.a.shape[1]
        if not 0 < delta.rank <= min(outputs, inputs):
            raise AdapterError(
                f"{where}: rank {delta.rank} is outside 1 to {min(outputs, inputs)} of its {outputs} x {inputs}"
            )
        _validate_tensor(where, "a", delta.a, [delta.rank, inputs])
        _validate_tensor(where, "b", delta.b, [outputs, delta.rank])
    for name, tensor, size in (
        ("magnitude", delta.magnitude, outputs),
        ("bias", delta.bias, outputs),
        ("output_scale", delta.output_scale, outputs),
        ("input_scale", delta.input_scale, inputs),
    ):
        if tensor is not None:
            _validate_tensor(where, name, tensor, [tensor.numel() if size is None else size])


def _validate_tensor(where: str, name: str, tensor: Tensor | None, shape: list[int]) -> None:
    if tensor is None:
        return
    if list(tensor.shape) != shape:
        raise AdapterError(f"{where}: {name} has shape {list(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point():
        raise AdapterError(f"{where}: {name} is {tensor.dtype}, expected floating point numbers")
