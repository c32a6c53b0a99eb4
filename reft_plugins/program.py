"""What an adapter does, free of how it was learned: four kinds of node that every runtime executes.

Methods lower to these nodes (`Method.lower`); runtimes and exporters know nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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

ORDER = (
    "block_input",
    "attention_value_output",
    "attention_output",
    "mlp_residual",
    "mlp_activation",
    "mlp_output",
    "block_output",
)
"""Components in the order in which a layer computes them; `attention_residual` is `block_input`."""

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "elu")
"""Element-wise functions an `Edit` may apply in its low-rank space, by the field's names."""

ALL = Positions.parse("all")


def canonical(component: str) -> str:
    """One name for the components that are the same tensor in every architecture."""
    return "block_input" if component == "attention_residual" else component


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

    Several deltas of one module run in program order, each on what the one before made of it.

    Attributes:
        module: qualified name of a module with a weight in the base model, transformers naming. An embedding is a
            linear map of one-hot tokens, `in` being the vocabulary; a normalisation takes `new_weight`, `new_bias` and
            scales only.
        a: `[rank, in]`, b: `[out, rank]`, both or neither.
        magnitude: `[out]`, the learned row norms of DoRA (arXiv:2402.09353 eq. 5); None leaves rows as they are.
        bias: `[out]`, added to the output.
        input_scale: `[in]`; output_scale: `[out]` (IA3, arXiv:2205.05638).
        positions: tokens the change applies to; anything but `all` cannot be merged.
        new_weight, new_bias: stand in for the module's own weight and bias before anything else is applied (full
            fine-tuning, trained heads), in the layout of the module's own state.
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
    new_weight: Tensor | None = None
    new_bias: Tensor | None = None

    @property
    def replaces(self) -> bool:
        """True where parameters of the base are replaced."""
        return self.new_weight is not None or self.new_bias is not None

    @property
    def rank(self) -> int:
        """Rows of `a`; 0 where only scales or a bias change."""
        return 0 if self.a is None else int(self.a.shape[0])

    @property
    def plain(self) -> bool:
        """True for what LoRA kernels execute: `scaling * b @ a` on every token and nothing else."""
        extras = (self.magnitude, self.bias, self.input_scale, self.output_scale)
        changed = self.replaces or any(extra is not None for extra in extras)
        return self.a is not None and self.positions.everywhere and not changed

    def __str__(self) -> str:
        return f"WeightDelta({self.module}, rank {self.rank})"


@dataclass(frozen=True, slots=True, eq=False)
class VirtualTokens:
    """Learned embeddings `[n, hidden]` in front of the prompt, at positions 0 to n-1; real tokens begin at n.

    They replace the output of the embedding module, before any learned position is added. Positions of edits count
    the tokens of the original prompt only.
    """

    embeddings: Tensor

    def __str__(self) -> str:
        return f"VirtualTokens({self.embeddings.shape[0]})"


@dataclass(frozen=True, slots=True, eq=False)
class KeyValuePrefix:
    """Learned keys and values `[n, kv_heads, head_dim]` of one layer, used as they are (no rotary embedding).

    Without a gate they join the real keys' softmax and stand at positions 0 to n-1, real tokens beginning at n. With
    `gate`, `[1]` or `[heads]`, they have a softmax of their own whose result is multiplied by it and added, and no
    position moves (LLaMA-Adapter, arXiv:2303.16199 eq. 6): before the output projection, or where `projected` is
    False to the attention's output after it.
    """

    layer: int
    keys: Tensor
    values: Tensor
    gate: Tensor | None = None
    projected: bool = True

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
    def prefixes(self) -> tuple[KeyValuePrefix, ...]:
        """The `KeyValuePrefix` nodes in order."""
        return tuple(node for node in self.nodes if isinstance(node, KeyValuePrefix))

    @property
    def virtual_tokens(self) -> int:
        """How many learned embeddings stand in front of the prompt."""
        return sum(len(node.embeddings) for node in self.nodes if isinstance(node, VirtualTokens))

    @property
    def in_front(self) -> int:
        """How many positions real tokens are moved back by: pairs of prefixes in the same softmax, virtual tokens."""
        return self.virtual_tokens + max((len(node.keys) for node in self.prefixes if node.gate is None), default=0)

    @property
    def max_rank(self) -> int:
        """The largest rank of any edit, or of all weight deltas of one module together; at least 1."""
        modules: dict[str, int] = {}
        for delta in self.weight_deltas:
            modules[delta.module] = modules.get(delta.module, 0) + delta.rank
        return max([1, *(edit.rank for edit in self.edits), *modules.values()])

    def validate(self, base: BaseModelIdentity | None = None) -> None:
        """Check shapes, names and, where the base is known, layers and widths.

        Raises:
            AdapterError: naming the node and what does not fit.
        """
        from reft_plugins.validation import check_program

        check_program(self.nodes, base)
