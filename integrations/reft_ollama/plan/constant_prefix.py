"""Edits that only touch the constant beginning of every prompt, and the constants they come to there.

A chat format begins every prompt with the same tokens. Attention is causal, so the states at those positions are the
same in every conversation, and whatever an edit does to them, linear or not, is a known vector per layer and position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins.fidelity.reference import Reference, move
from reft_plugins.positions import OPEN_END, Positions
from reft_plugins.program import Edit, Node, Program, Site, canonical

LENGTHS_TRIED = 512
"""Prompt lengths, from the shortest possible one on, at which an edit has to touch the same tokens."""

LONG = 10**6
"""A prompt that nothing is clipped to the length of."""

NEGLIGIBLE = 1e-5
"""A change of a state, relative to it, that is rounding."""


@dataclass(frozen=True, slots=True)
class ConstantPrefix:
    """Token ids that every prompt begins with, and the length in tokens of the shortest prompt."""

    tokens: tuple[int, ...]
    shortest: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> ConstantPrefix:
        """What the token ids of prompts with the most different contents have in common."""
        shortest = min(map(len, prompts))
        differing = (n for n in range(shortest) if len({prompt[n] for prompt in prompts}) > 1)
        return cls(tuple(prompts[0][: next(differing, shortest)]), shortest)

    def holds(self, positions: Positions) -> bool:
        """Whether `positions` name the same tokens of this beginning, and no others, in every prompt."""
        lengths = range(self.shortest, self.shortest + LENGTHS_TRIED)
        found = {positions.within(length, 0, OPEN_END) for length in (*lengths, LONG)}
        return len(found) == 1 and found != {()} and all(stop <= len(self.tokens) for _, stop in next(iter(found)))

    def reach(self, nodes: Sequence[Node]) -> int:
        """How many of these tokens there are up to the last one that a node touches."""
        intervals = [node.positions.within(self.shortest, 0, OPEN_END) for node in nodes if isinstance(node, Edit)]
        return max(stop for several in intervals for _, stop in several)

    def split(self, program: Program) -> tuple[list[Node], list[Node]]:
        """The edits that only touch this beginning, and all other nodes.

        Virtual tokens stand in front of the beginning, which is then another one in every layer but the first; no edit
        is taken beside them. Nor are those of a site where another edit would read something else without them.
        """
        sites: dict[tuple[int, str], list[Edit]] = {}
        for edit in () if program.virtual_tokens else program.edits:
            sites.setdefault((edit.site.layer, canonical(edit.site.component)), []).append(edit)
        taken: set[int] = set()
        for edits in sites.values():
            mine = {id(edit) for edit in edits if self.holds(edit.positions)}
            if _reads(edits, mine) == _reads([edit for edit in edits if id(edit) not in mine]):
                taken |= mine
        found: tuple[list[Node], list[Node]] = ([], [])
        for node in program:
            found[id(node) not in taken].append(node)
        return found


def _reads(edits: Sequence[Edit], idle: Collection[int] = ()) -> list[int]:
    """How many edits of a site have changed what each of them reads, at tokens where those with an id in `idle` do not
    work; see `Edit` for simultaneous ones."""
    changed, read, found = 0, 0, []
    for edit in edits:
        read = read if edit.simultaneous else changed
        if id(edit) not in idle:
            found.append(read)
            changed += 1
    return found


@dataclass(frozen=True, slots=True, eq=False)
class PrefixChanges:
    """What edits add to the states of constant tokens.

    Attributes:
        tokens: the first ids of every prompt, up to the last edited one.
        embeddings: what the first layer reads for them, as edited, `[tokens, hidden]`.
        layers: what is added to the output of a layer, `[tokens, hidden]` each; only layers where it is not zero.
        squares: sum of squares of what the norm in front of each of these layers' MLPs reads, `[tokens]` each.
    """

    tokens: tuple[int, ...]
    embeddings: Tensor
    layers: dict[int, Tensor]
    squares: dict[int, Tensor]


def prefix_changes(
    reference: Reference, others: Sequence[Node], tokens: Sequence[int], layer_name: str, norm_name: str
) -> PrefixChanges:
    """Run a program on the constant tokens, and see what its prefix edits add to what the other nodes do.

    Edits are placed as in a long prompt, of which these tokens are the beginning. The other nodes are run on the states
    that the whole program has, layer by layer, so that every difference is that layer's own.

    Args:
        reference: the base model with the program; others: the program without its prefix edits.
        layer_name: qualified name of a decoder layer with `{}` for its index; norm_name: of its MLP's norm, inside.
    """
    model, executor = reference.model, reference.executor
    count = model.config.num_hidden_layers
    ids = torch.tensor([list(tokens)], device=reference.device)
    lengths = torch.tensor([LONG])
    sites = [*(Site(layer, "block_input") for layer in range(count)), Site(count - 1, "block_output")]
    with torch.inference_mode(), executor.run([reference.program], lengths), executor.capture(sites) as captured:
        model(input_ids=ids, use_cache=False)
    edited = [captured[site][0].double() for site in sites]
    seen: dict[int, Tensor] = {}
    squares: dict[int, Tensor] = {}
    layers = [model.get_submodule(layer_name.format(n)) for n in range(count)]
    watching = _replacing(layers, norm_name, edited, seen, squares)
    with torch.inference_mode(), executor.run([move(Program(tuple(others)), reference.device)], lengths), watching:
        model(input_ids=ids, use_cache=False)
    changes = {n: edited[n] - seen[n] for n in range(count + 1)}
    touched = {
        n: change for n, change in changes.items() if bool(change.abs().max() > NEGLIGIBLE * edited[n].abs().max())
    }
    return PrefixChanges(
        tokens=tuple(tokens),
        embeddings=edited[0],
        layers={n - 1: change for n, change in touched.items() if n},
        squares={n - 1: squares[n - 1] for n in touched if n},
    )


@contextmanager
def _replacing(
    layers: Sequence[nn.Module],
    norm: str,
    states: Sequence[Tensor],
    seen: dict[int, Tensor],
    squares: dict[int, Tensor],
) -> Iterator[None]:
    """Inside, every layer reads `states[n]` instead of its input, which is kept in `seen[n]`."""

    def before(n: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            own = args[0] if args else kwargs["hidden_states"]
            seen[n] = own[0].double()
            new = states[n][None].to(own)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen[len(layers)] = (output[0] if isinstance(output, tuple) else output)[0].double()

    def measure(n: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[n] = args[0][0].double().pow(2).sum(-1)

        return hook

    handles = [layer.register_forward_pre_hook(before(n), with_kwargs=True) for n, layer in enumerate(layers)]
    handles += [layer.get_submodule(norm).register_forward_pre_hook(measure(n)) for n, layer in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
