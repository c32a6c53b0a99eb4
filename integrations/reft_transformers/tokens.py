"""Which tokens of the current forward pass a node applies to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Program

Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Group:
    """Rows of the batch that share one program.

    Attributes:
        rows: ascending; whole: True where they are all rows of the batch.
    """

    program: Program
    rows: Int64Array
    whole: bool


def group_rows(programs: Sequence[Program | None]) -> list[Group]:
    """The distinct programs of a batch, each with its rows."""
    found: dict[int, tuple[Program, list[int]]] = {}
    for row, program in enumerate(programs):
        if program is not None:
            found.setdefault(id(program), (program, []))[1].append(row)
    return [Group(program, np.array(rows), len(rows) == len(programs)) for program, rows in found.values()]


class Tokens:
    """Where the tokens of one forward pass after the other stand in their own sequences.

    All of it is decided on the CPU, in numpy: on a GPU a forward pass waits once, for the attention mask.

    Args:
        programs: one per row; prompt_lengths: int64 `[rows]`, tokens of each prompt without padding and virtual tokens.
    """

    def __init__(self, programs: Sequence[Program | None], prompt_lengths: Tensor) -> None:
        self.groups = group_rows(programs)
        self._virtual = np.array([program.virtual_tokens if program else 0 for program in programs])
        self._lengths = prompt_lengths
        self._prompts: Int64Array | None = None
        self.slots: Int64Array = np.zeros((len(programs), 0), dtype=np.int64)
        """Index `[rows, tokens]` of each token in its own sequence, virtual tokens counted; -1 for padding."""
        self._chosen: dict[tuple[Positions, int, int], Tensor | None] = {}
        self._everything = False

    def observe(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: derive each token's index from the attention mask, which covers the cache too.

        Generation leaves the mask out where nothing is padded; then the tokens follow those in the cache.
        """
        self._chosen.clear()
        given = next(
            (v for v in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None), None
        )
        if given is None:
            raise UnsupportedProgramError("this forward pass of the model has neither input_ids nor inputs_embeds")
        rows, count = given.shape[:2]
        if rows != len(self._virtual):
            raise UnsupportedProgramError(f"a forward pass over {rows} rows, but programs for {len(self._virtual)}")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        if mask is None:
            slots = np.broadcast_to(np.arange(start, start + count), (rows, count))
            sizes = np.full(rows, start + count)
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask.cpu().numpy() != 0
            counted = real.cumsum(-1)
            slots, sizes = np.where(real, counted - 1, -1)[:, -count:], counted[:, -1]
        else:
            raise UnsupportedProgramError(
                "padding is told from tokens by a 2D attention mask, which this forward pass of the model lacks"
            )
        if start == 0 and self._virtual.any() and np.any(sizes < self.prompts + self._virtual):
            raise AdapterError(
                "a program with VirtualTokens runs on rows that Executor.widen made room in; these have none"
            )
        self.slots = slots
        self._everything = bool((slots >= self._virtual[:, None]).all())

    @property
    def prompts(self) -> Int64Array:
        """Prompt lengths `[rows]`."""
        if self._prompts is None:
            self._prompts = self._lengths.cpu().numpy()
        return self._prompts

    def chosen(self, positions: Positions, group: Group, width: int | None = None) -> Tensor | None:
        """The tokens of a group's rows at `positions`.

        Args:
            width: how many of the last columns are there; by default all.

        Returns:
            int64 `[n]` on the CPU, indices into the flattened `[rows, tokens]`; None for all tokens of the batch.
        """
        total = self.slots.shape[1]
        columns = total if width is None else width
        key = (positions, id(group), columns)
        if key not in self._chosen:
            if positions.everywhere and group.whole and self._everything:
                self._chosen[key] = None
            else:
                own = self.slots[group.rows, total - columns :] - self._virtual[group.rows, None]
                row, column = np.nonzero(positions.mask(own, self.prompts[group.rows, None]))
                self._chosen[key] = torch.from_numpy(group.rows[row] * columns + column)
        return self._chosen[key]

    def check(self, hidden: Tensor) -> None:
        """Refuse a tensor that is not laid out `[rows, tokens, ...]`.

        Raises:
            UnsupportedProgramError: the model folds or splits rows or tokens there.
        """
        if hidden.ndim < 3 or tuple(hidden.shape[:2]) != self.slots.shape:
            raise UnsupportedProgramError(
                f"the model has a tensor {list(hidden.shape)} where {list(self.slots.shape)} "
                f"rows and tokens were expected"
            )
