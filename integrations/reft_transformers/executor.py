"""Runs programs inside a transformers model: the reference for what a program means.

Rows of one batch may run different programs. Forward hooks sit only on the modules that a bound program touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, WeightDelta
from reft_transformers.components import Components
from reft_transformers.nodes import apply_edits, apply_weight_delta


@dataclass(slots=True, eq=False)
class Group:
    """Rows of the batch that share one program."""

    program: Program
    rows: Tensor


class Executor:
    """Binds programs to a model for the forward passes inside a `with executor.run(...)` block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.components = Components.find(model)
        self._token_positions: Tensor | None = None
        self._prompt_lengths: Tensor | None = None
        self._masks: dict[tuple[Positions, int], Tensor] = {}

    @contextmanager
    def run(self, programs: Sequence[Program | None], prompt_lengths: Tensor) -> Iterator[None]:
        """Execute `programs[i]` on row `i` of every forward pass inside the block.

        Args:
            programs: one per row, None for the bare base.
            prompt_lengths: int64 `[rows]`, tokens of each prompt without padding.

        Raises:
            UnsupportedProgramError: naming a node this runtime does not execute.
        """
        handles = [self.model.register_forward_pre_hook(self._observe, with_kwargs=True)]
        self._prompt_lengths = prompt_lengths
        try:
            for module, hook in self._hooks(_group(programs)):
                handles.append(hook(module))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._token_positions = self._prompt_lengths = None
            self._masks.clear()

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Derive each token's index in its own sequence from the attention mask, which covers cached tokens too.

        Generation leaves the mask out where nothing is padded; then the tokens follow those in the cache.
        """
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        count = tokens.shape[1]
        self._masks.clear()
        if mask is None:
            start = 0 if cache is None else int(cache.get_seq_length())
            self._token_positions = torch.arange(start, start + count, device=tokens.device).expand(tokens.shape)
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, -1)
            self._token_positions = positions[:, -count:]
        else:
            raise UnsupportedProgramError(
                "padding is told from tokens by a 2D attention mask, which this forward pass of the model lacks"
            )

    def _hooks(self, groups: list[Group]) -> Iterator[tuple[nn.Module, Callable[[nn.Module], Any]]]:
        sites: dict[tuple[int, str], list[tuple[Group, list[Edit]]]] = {}
        modules: dict[str, list[tuple[Group, WeightDelta]]] = {}
        for group in groups:
            edits: dict[tuple[int, str], list[Edit]] = {}
            for node in group.program:
                if isinstance(node, Edit):
                    self._supported(node)
                    edits.setdefault((node.site.layer, node.site.component), []).append(node)
                elif isinstance(node, WeightDelta):
                    modules.setdefault(node.module, []).append((group, node))
                else:
                    raise UnsupportedProgramError(f"the transformers runtime does not execute {node} yet")
            for site, sequence in edits.items():
                sites.setdefault(site, []).append((group, sequence))
        for (layer, component), work in sites.items():
            module, is_input = self.components.locate(layer, component)
            yield module, self._edit_hook(work, is_input)
        for name, deltas in modules.items():
            yield self.components.linear(name, deltas[0][1]), self._delta_hook(deltas)

    def _supported(self, edit: Edit) -> None:
        self.components.locate(edit.site.layer, edit.site.component)
        if edit.reads not in (None, edit.site.component):
            raise UnsupportedProgramError(
                f"{edit}: reading {edit.reads} is not executed by the transformers runtime yet"
            )

    def _edit_hook(self, work: list[tuple[Group, list[Edit]]], is_input: bool) -> Callable[[nn.Module], Any]:
        def change(hidden: Tensor) -> Tensor:
            for group, edits in work:
                masks = [self._mask(edit.positions, group) for edit in edits]
                hidden = _replace_rows(
                    hidden, group.rows, lambda rows, e=edits, m=masks: apply_edits(rows, e, m, self.model.training)
                )
            return hidden

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        if is_input:
            return lambda module: module.register_forward_pre_hook(before, with_kwargs=True)
        return lambda module: module.register_forward_hook(after)

    def _delta_hook(self, deltas: list[tuple[Group, WeightDelta]]) -> Callable[[nn.Module], Any]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            for group, delta in deltas:
                inputs = args[0] if group.rows.numel() == output.shape[0] else args[0][group.rows]
                mask = None if delta.positions.everywhere else self._mask(delta.positions, group)
                output = _replace_rows(
                    output, group.rows, lambda y, d=delta, x=inputs, m=mask: apply_weight_delta(module, d, x, y, m)
                )
            return output

        return lambda module: module.register_forward_hook(after)

    def _mask(self, positions: Positions, group: Group) -> Tensor:
        """bool `[rows of the group, tokens]`: the tokens of the current forward pass at `positions`."""
        key = (positions, id(group))
        if key not in self._masks:
            assert self._token_positions is not None and self._prompt_lengths is not None
            rows, device = group.rows, self._token_positions.device
            token_positions = self._token_positions[rows.to(device)].cpu()
            lengths = self._prompt_lengths[rows.to(self._prompt_lengths.device)].cpu()
            mask = positions.mask(token_positions.numpy(), lengths[:, None].numpy())
            self._masks[key] = torch.from_numpy(mask).to(device)
        return self._masks[key]


def _group(programs: Sequence[Program | None]) -> list[Group]:
    found: dict[int, tuple[Program, list[int]]] = {}
    for row, program in enumerate(programs):
        if program is not None:
            found.setdefault(id(program), (program, []))[1].append(row)
    return [Group(program, torch.tensor(rows)) for program, rows in found.values()]


def _replace_rows(batch: Tensor, rows: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`batch` with some rows changed; all of them at once where the group is the whole batch."""
    if rows.numel() == batch.shape[0]:
        return change(batch)
    index = rows.to(batch.device)
    return batch.index_copy(0, index, change(batch[index]).to(batch.dtype))
