"""Several edits at one site as a single affine map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_plugins.activations import FUNCTIONS
from reft_plugins.program import Edit


@dataclass(frozen=True, slots=True, eq=False)
class AffineEdit:
    """`h <- h + (h downᵀ + bias) up + shift`.

    All float64: `down` and `up` `[rank, hidden]`, `bias` `[rank]`, `shift` `[hidden]`.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    shift: Tensor

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return int(self.down.shape[0])

    @property
    def constant(self) -> bool:
        """Whether the change is the same for every `h`."""
        parts = (self.down[:, start : start + 1024] for start in range(0, self.down.shape[1], 1024))
        return not any(bool(torch.any(part.T @ self.up)) for part in parts)

    @property
    def linear(self) -> bool:
        """Whether `h = 0` stays what it is."""
        return not bool(torch.any(self.constant_part().shift))

    @property
    def gains(self) -> Tensor | None:
        """What each element is multiplied by, `[hidden]`, where the edit does no more to it than that and adding."""
        rows, columns = (self.down != 0).any(1), (self.up != 0).any(1)
        used = rows & columns
        down, up = self.down[used], self.up[used]
        single = ((down != 0).sum(1) == 1) & ((up != 0).sum(1) == 1)
        same = (down != 0).int().argmax(1) == (up != 0).int().argmax(1)
        if not bool((single & same).all()):
            return None
        return 1 + (down * up).sum(0)

    def constant_part(self) -> AffineEdit:
        """What is added to `h = 0`, as an edit of rank 0."""
        return AffineEdit(self.down[:0], self.up[:0], self.bias[:0], self.bias @ self.up + self.shift)

    def to(self, device: torch.device) -> AffineEdit:
        """The same on a device."""
        return AffineEdit(*(tensor.to(device) for tensor in (self.down, self.up, self.bias, self.shift)))

    def change(self, hidden: Tensor) -> Tensor:
        """What is added to `hidden`, float64 `[..., hidden]`."""
        return (hidden.double() @ self.down.T + self.bias) @ self.up + self.shift


def compose(edits: Sequence[Edit]) -> AffineEdit:
    """The affine map of edits that run one after another at one site.

    Every edit must be affine: an identity activation, or `down` zero, where the activation only sees its bias.
    A `simultaneous` edit reads what the edit before it read (see `reft_plugins.program.Edit`).
    """
    size = next(int(t.shape[-1]) for e in edits for t in (e.down, e.scale, e.shift) if t is not None)
    empty, zero = torch.zeros(0, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    total = read = AffineEdit(empty, empty, zero[:0], zero)
    for edit in edits:
        source = read if edit.simultaneous else total
        total, read = _add(total, _after(_single(edit, zero), source)), source
    return total


def is_affine(edit: Edit) -> bool:
    """Whether `compose` can take the edit."""
    return edit.activation == "identity" or edit.down is None or not bool(torch.any(edit.down))


def _single(edit: Edit, zero: Tensor) -> AffineEdit:
    down, up, bias = [], [], []
    shift = zero if edit.shift is None else edit.shift.double()
    if edit.down is not None and edit.up is not None:
        constant = torch.zeros(edit.rank, dtype=torch.float64) if edit.bias is None else edit.bias.double()
        if not torch.any(edit.down):
            shift = shift + FUNCTIONS[edit.activation](constant) @ edit.up.double()
        else:
            down.append(edit.down.double())
            up.append(edit.up.double())
            bias.append(constant)
    if edit.scale is not None:
        excess = edit.scale.double() - 1
        changed = torch.nonzero(excess).flatten()
        unit = torch.zeros(len(changed), len(zero), dtype=torch.float64)
        unit[torch.arange(len(changed)), changed] = 1.0
        down.append(unit * excess[changed, None])
        up.append(unit)
        bias.append(torch.zeros(len(changed), dtype=torch.float64))
    if not down:
        return AffineEdit(zero.new_zeros(0, len(zero)), zero.new_zeros(0, len(zero)), zero[:0], shift)
    return AffineEdit(torch.cat(down), torch.cat(up), torch.cat(bias), shift)


def _after(edit: AffineEdit, first: AffineEdit) -> AffineEdit:
    """The change `edit` makes when it reads the output of `first`, as a map of what `first` reads."""
    down = edit.down + (edit.down @ first.up.T) @ first.down
    bias = edit.bias + edit.down @ (first.up.T @ first.bias + first.shift)
    return AffineEdit(down, edit.up, bias, edit.shift)


def _add(one: AffineEdit, other: AffineEdit) -> AffineEdit:
    return AffineEdit(
        torch.cat([one.down, other.down]),
        torch.cat([one.up, other.up]),
        torch.cat([one.bias, other.bias]),
        one.shift + other.shift,
    )
