"""Memory for the parameters of all loaded adapters, shared by layers, adapters and methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reft_plugins.errors import UnsupportedProgramError

INITIAL_PAGES = 256


def sent(values: Tensor, to: Tensor) -> Tensor:
    """Values on the device of another tensor, in the order of its stream."""
    if to.device == values.device:
        return values
    return values.pin_memory().to(to.device, non_blocking=True)


class Pages:
    """Rows of one width, each a page; page 0 is zero and stands for "none".

    Attributes:
        buffer: `[pages, width]`.
        growable: double when full; buffers that captured graphs point at must not.
    """

    def __init__(self, width: int, count: int, device: torch.device, dtype: torch.dtype, growable: bool) -> None:
        self.width, self.growable = width, growable
        self.buffer = torch.zeros(count, width, device=device, dtype=dtype)
        self._free = list(range(count - 1, 0, -1))

    @property
    def capacity(self) -> int:
        """Pages there are, without page 0."""
        return len(self.buffer) - 1

    @property
    def resident(self) -> int:
        """Pages in use."""
        return self.capacity - len(self._free)

    def store(self, values: Tensor) -> list[int]:
        """Copy rows `[n, width]` in and return their pages.

        Raises:
            UnsupportedProgramError: the pool is full and cannot grow.
        """
        pages = self.reserve(len(values))
        self.write(pages, values)
        return pages

    def reserve(self, count: int) -> list[int]:
        """Pages to write to.

        Raises:
            UnsupportedProgramError: the pool is full and cannot grow.
        """
        while count > len(self._free):
            self._grow(count)
        return [self._free.pop() for _ in range(count)]

    def write(self, pages: Sequence[int], values: Tensor) -> None:
        """Copy rows `[n, width]` into pages; a device is not waited for."""
        if pages:
            self.buffer[sent(torch.tensor(pages), self.buffer)] = sent(values.to(self.buffer.dtype), self.buffer)

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; their contents stay until they are stored over."""
        self._free.extend(pages)

    def _grow(self, count: int) -> None:
        if not self.growable:
            raise UnsupportedProgramError(
                f"the page pool is full: {count} more pages of {self.width} do not fit beside {self.resident}. Use "
                "fewer slots (--max-loras) or a larger pool (pool_mib in the reft part of --additional-config)"
            )
        old = len(self.buffer)
        self.buffer = torch.cat([self.buffer, torch.zeros_like(self.buffer)])
        self._free = list(range(2 * old - 1, old - 1, -1)) + self._free


class Pool:
    """The pages of every width in use.

    Args:
        size: memory of each width in bytes where pages are not growable.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, growable: bool, size: int) -> None:
        self.device, self.dtype, self.growable, self.size = device, dtype, growable, size
        self.by_width: dict[int, Pages] = {}

    def of(self, width: int) -> Pages:
        """The pages of a width."""
        if width not in self.by_width:
            fixed = max(2, self.size // (width * self.dtype.itemsize))
            count = INITIAL_PAGES if self.growable else fixed
            self.by_width[width] = Pages(width, count, self.device, self.dtype, self.growable)
        return self.by_width[width]

    @property
    def resident(self) -> int:
        """Pages in use, of all widths."""
        return sum(pages.resident for pages in self.by_width.values())

    @property
    def resident_bytes(self) -> int:
        """Memory of the pages in use."""
        return sum(pages.resident * pages.width * self.dtype.itemsize for pages in self.by_width.values())
