"""Memory for the low-rank rows of all loaded edits of one hidden size, shared by layers, adapters and methods."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import ACTIVATIONS

DIAGONAL = len(ACTIVATIONS)
"""Code of a row that multiplies the state element by element instead of projecting it."""

INITIAL_ROWS = 1024


class Pool:
    """Rows `(down, up, bias, activation)`; row 0 is zero and stands for "no row".

    A row adds `act(x . down + bias) * up` to the representation, a `DIAGONAL` row `x * up`.

    Attributes:
        down, up: float32 `[rows, hidden]`; bias: float32 `[rows]`; activation: int8 `[rows]`.
        growable: double when full; buffers that captured graphs point at must not.
    """

    def __init__(self, hidden_size: int, rows: int, device: torch.device | str, growable: bool) -> None:
        self.hidden_size, self.growable = hidden_size, growable
        self.down = torch.zeros(rows, hidden_size, device=device)
        self.up = torch.zeros(rows, hidden_size, device=device)
        self.bias = torch.zeros(rows, device=device)
        self.activation = torch.zeros(rows, dtype=torch.int8, device=device)
        self._free = list(range(rows - 1, 0, -1))

    @property
    def resident(self) -> int:
        """Rows in use."""
        return len(self.bias) - 1 - len(self._free)

    def store(self, down: Tensor, up: Tensor, bias: Tensor, activation: int) -> list[int]:
        """Copy rows in: `down`, `up` `[n, hidden]`, `bias` `[n]`.

        Returns:
            their indices.

        Raises:
            UnsupportedProgramError: when the pool is full and cannot grow.
        """
        count = len(bias)
        while count > len(self._free):
            self._grow(count)
        rows = [self._free.pop() for _ in range(count)]
        index = torch.tensor(rows, device=self.bias.device, dtype=torch.long)
        for target, values in ((self.down, down), (self.up, up), (self.bias, bias)):
            target[index] = values.to(target)
        self.activation[index] = activation
        return rows

    def release(self, rows: list[int]) -> None:
        """Give rows back; their contents stay until they are stored over."""
        self._free.extend(rows)

    def _grow(self, count: int) -> None:
        if not self.growable:
            raise UnsupportedProgramError(
                f"the edit pool is full: {count} more rows of {self.hidden_size} do not fit beside {self.resident}. "
                "Load fewer adapters at once (max_loras) or start the engine with a larger REFT_POOL_ROWS"
            )
        old = len(self.bias)
        for name in ("down", "up", "bias", "activation"):
            buffer: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([buffer, torch.zeros_like(buffer)]))
        self._free = list(range(2 * old - 1, old - 1, -1)) + self._free
