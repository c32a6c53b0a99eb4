"""`compose`, `scale` and `negate`: from adapters to one adapter that keeps who its parents were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import BaseModel, check_base
from reft_plugins.compose.edits import add_edits, chain_edits, scale_edit
from reft_plugins.compose.prompts import join_prompts, scale_prompt
from reft_plugins.compose.weight_deltas import add_weight_deltas, refuse_chained
from reft_plugins.errors import AdapterError, BaseMismatchError
from reft_plugins.loading import load, source_name
from reft_plugins.manifest import BaseModelIdentity, Parent, TaskFact
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import KeyValuePrefix, Program, VirtualTokens

if TYPE_CHECKING:
    from reft_plugins.program import Node

Source = Adapter | str | Path
"""An adapter, a store reference or a folder."""


def compose(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    base: str | Path | None = None,
    sequential: bool = False,
) -> Adapter:
    """One adapter that does what several, learned apart, do together.

    At every site and module the weighted changes that the adapters make to the *same* state add up:

    - an edit becomes `h + w * (change of h)`: `up` and `shift` times `w`, `scale` by `1 + w (scale - 1)`. Edits of one
      site, positions and activation become rows of one subspace, others simultaneous edits;
    - a weight delta becomes `W + w (W' - W)`: low ranks are stacked, row or column scales become `1 + w (scale - 1)`.
      Row norms (DoRA) and whole new weights need `base`, unless a single adapter changes the module with weight 1;
    - virtual tokens and prefixes stand behind one another in the order of `adapters`; their weight is 1. The gate of a
      gated prefix takes any weight.

    A weight of 0 leaves an adapter out, -1 negates it (arXiv:2212.04089 for weights; arXiv:2404.03592 section 5 for
    subspaces).

    Args:
        adapters: at least one, all for the same base model.
        weights: one for each, by default 1.
        base: folder or hub id of the base model, where weights of it are needed.
        sequential: at each site let every adapter's edits read what the adapters before left, instead of adding up.

    Returns:
        an adapter of method `program`, whose parents are `adapters`.

    Raises:
        AdapterError: what cannot be combined exactly, with the reason; wrong weights.
        BaseMismatchError: the adapters belong to different base models.
    """
    chosen = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if not adapters or len(chosen) != len(adapters):
        raise AdapterError(f"{len(adapters)} adapters and {len(chosen)} weights: give one weight for each adapter")
    if not all(map(math.isfinite, chosen)):
        raise AdapterError(f"weights must be finite numbers, not {', '.join(f'{weight:g}' for weight in chosen)}")
    loaded = [load(adapter, base=base) for adapter in adapters]
    model = None if base is None else BaseModel.open(base)
    identity = same_base(loaded)
    task = _task(loaded)
    parts = [(w, learned_program(adapter)) for w, adapter in zip(chosen, loaded, strict=True) if w]
    nodes = combine_programs(parts, model, sequential)
    if not nodes:
        raise AdapterError("nothing is left: every adapter has weight 0 or does nothing by itself")
    notes = {"weights": ", ".join(f"{weight:g}" for weight in chosen)}
    if len(adapters) > 1:
        notes["composition"] = "sequential" if sequential else "simultaneous"
    parents = tuple(
        Parent(relation="composed", source=source_name(given), digest=adapter.digest)
        for given, adapter in zip(adapters, loaded, strict=True)
    )
    result = adapter_of(Program(tuple(nodes)), identity, parents=parents, notes=notes)
    return replace(result, manifest=result.manifest.model_copy(update={"task": task}))


def scale(adapter: Source, weight: float, *, base: str | Path | None = None) -> Adapter:
    """The adapter with the change that each of its nodes makes times `weight`; see `compose` for errors and `base`."""
    return compose([adapter], [weight], base=base)


def negate(adapter: Source, *, base: str | Path | None = None) -> Adapter:
    """The adapter that makes the opposite change everywhere: `scale(adapter, -1)`."""
    return scale(adapter, -1.0, base=base)


def combine_programs(
    parts: Sequence[tuple[float, Program]], base: BaseModel | None = None, sequential: bool = False
) -> list[Node]:
    """The nodes of `compose`, for programs with their weights."""
    edits = [[scale_edit(edit, weight) for edit in program.edits] for weight, program in parts]
    fronts = [
        [scale_prompt(node, weight) for node in program if isinstance(node, VirtualTokens | KeyValuePrefix)]
        for weight, program in parts
    ]
    for _, program in parts:
        refuse_chained(program.weight_deltas)
    deltas = [(weight, delta) for weight, program in parts for delta in program.weight_deltas]
    together = chain_edits(edits) if sequential or len(parts) == 1 else add_edits(edits)
    return [*join_prompts([front for front in fronts if front]), *add_weight_deltas(deltas, base), *together]


def _task(adapters: Sequence[Adapter]) -> TaskFact | None:
    """The task of the one adapter that brings a classifier; two of them have heads that cannot be one."""
    tasks = [adapter.manifest.task for adapter in adapters if adapter.manifest.task is not None]
    if len(tasks) > 1:
        raise AdapterError(f"{len(tasks)} of the adapters classify texts, each with a head of its own; compose one")
    return tasks[0] if tasks else None


def learned_program(adapter: Adapter) -> Program:
    """What an adapter's parameters make, before any `reft_lower` hook: those see the composition when it is lowered."""
    method = plugins.methods.get(adapter.manifest.method)
    program: Program = method.lower(parse_config(method, adapter.manifest.config), adapter.tensors)
    program.validate(adapter.manifest.base)
    return program


def same_base(adapters: Sequence[Adapter]) -> BaseModelIdentity:
    """The base model all adapters were made for.

    Raises:
        BaseMismatchError: one was made for another, or does not say for which.
    """
    identity = next((a.manifest.base for a in adapters if a.manifest.base is not None), None)
    if identity is None:
        raise BaseMismatchError("no adapter says which base model it was made for; import them again with --base")
    for adapter in adapters:
        check_base(adapter.manifest, identity)
    return identity
