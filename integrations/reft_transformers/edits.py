"""Hooks that run `Edit` nodes at their sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import ORDER, Edit, canonical
from reft_transformers.components import Components, Place
from reft_transformers.hooks import Hook, on_input, on_output
from reft_transformers.nodes import edit_tokens
from reft_transformers.tokens import Group, Tokens


@dataclass(slots=True, eq=False)
class Layer:
    """The edits of one layer, by component, and the current value of every component that one of them reads."""

    edits: dict[str, list[tuple[Group, list[Edit]]]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


def edit_hooks(model: nn.Module, components: Components, tokens: Tokens) -> Iterator[Hook]:
    """The hooks of all edits of a batch, in the order in which a forward pass reaches them.

    Raises:
        AdapterError, UnsupportedProgramError: as `Components.locate`, or an edit reads what is computed after it.
    """
    layers: dict[int, Layer] = {}
    for group in tokens.groups:
        for edit in group.program.edits:
            sites = layers.setdefault(edit.site.layer, Layer()).edits
            work = sites.setdefault(canonical(edit.site.component), [])
            if not work or work[-1][0] is not group:
                work.append((group, []))
            work[-1][1].append(_readable(edit))
    for index, layer in layers.items():
        read = {edit.reads for work in layer.edits.values() for _, edits in work for edit in edits}
        for component in ORDER:
            if component in layer.edits:
                work = layer.edits[component]
                yield from changing(components.locate(index, component), _change(model, tokens, work, layer.values))
            if component in read:
                yield watching(components.locate(index, component), _keep(layer.values, component))


def changing(place: Place, change: Callable[[Tensor], Tensor]) -> Iterator[Hook]:
    """Hooks that replace a component."""
    if place.kept_by is None:
        yield (on_input if place.side == "input" else on_output)(place.module, change)
        return
    moved: list[Tensor] = []

    def enter(hidden: Tensor) -> Tensor:
        changed = change(hidden)
        moved[:] = [changed - hidden]
        return changed

    yield on_input(place.module, enter)
    yield on_output(place.kept_by, lambda output: output + moved.pop())


def watching(place: Place, watch: Callable[[Tensor], None]) -> Hook:
    """A hook that sees a component."""

    def change(hidden: Tensor) -> Tensor:
        watch(hidden)
        return hidden

    return (on_input if place.side == "input" else on_output)(place.module, change)


def _readable(edit: Edit) -> Edit:
    """The edit with `reads` in canonical form, None where it reads the component it writes."""
    if edit.reads is None:
        return edit
    reads, writes = canonical(edit.reads), canonical(edit.site.component)
    if reads == writes:
        return replace(edit, reads=None)
    if ORDER.index(reads) > ORDER.index(writes):
        raise UnsupportedProgramError(f"{edit}: a layer computes {reads} after {writes}, so it cannot be read there")
    return replace(edit, reads=reads)


def _change(
    model: nn.Module, tokens: Tokens, work: Sequence[tuple[Group, list[Edit]]], values: dict[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    def change(hidden: Tensor) -> Tensor:
        tokens.check(hidden)
        chosen = [[(edit, tokens.chosen(edit.positions, group)) for edit in edits] for group, edits in work]
        return edit_tokens(hidden, chosen, values, model.training)

    return change


def _keep(values: dict[str, Tensor], component: str) -> Callable[[Tensor], None]:
    return lambda hidden: values.__setitem__(component, hidden)
