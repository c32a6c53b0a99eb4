"""Hooks that run `WeightDelta` nodes on their modules: linear ones, `Conv1D`, embeddings, norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.program import WeightDelta
from reft_transformers.components import Components
from reft_transformers.hooks import Hook
from reft_transformers.nodes import _like
from reft_transformers.tokens import Group, Tokens


def delta_hooks(components: Components, tokens: Tokens) -> Iterator[Hook]:
    """The hooks of all weight deltas of a batch.

    Raises:
        AdapterError: the base has no such module, or one of another size.
        UnsupportedProgramError: the module is of a kind that the delta has no meaning for.
    """
    modules: dict[str, list[tuple[Group, WeightDelta]]] = {}
    for group in tokens.groups:
        for delta in group.program.weight_deltas:
            modules.setdefault(delta.module, []).append((group, delta))
    for name, work in modules.items():
        module = components.module(name, work[0][1])
        yield module, "output", _hook(module, [(group, Delta(module, delta)) for group, delta in work], tokens)


class Delta:
    """A weight delta and the base module it applies to."""

    def __init__(self, module: nn.Module, delta: WeightDelta) -> None:
        self.module, self.delta = module, delta
        self.embedding = isinstance(module, nn.Embedding)
        self._check()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The module's output under the delta.

        Args:
            x: input, `[..., in]` or token ids `[...]` of an embedding; y: the base module's output of it, `[..., out]`.
        """
        delta = self.delta
        wide = torch.promote_types(y.dtype, torch.float32)
        output = y.to(wide)
        if delta.input_scale is not None:
            x = x.to(wide) * _like(delta.input_scale, y).to(wide)
        if delta.replaces or delta.input_scale is not None:
            output = self._base(x.to(y.dtype) if not self.embedding else x).to(wide)
        if delta.magnitude is not None:
            bias = self._bias()
            output = output if bias is None else output - _like(bias, output)
            output = self._low_rank(x, output)
            norms = self._row_norms().to(output.device, wide)
            output = output * (_like(delta.magnitude, output) / norms)
            output = output if bias is None else output + _like(bias, output)
        else:
            output = self._low_rank(x, output)
        if delta.output_scale is not None:
            output = output * _like(delta.output_scale, output)
        if delta.bias is not None:
            output = output + _like(delta.bias, output)
        return output.to(y.dtype)

    def _low_rank(self, x: Tensor, output: Tensor) -> Tensor:
        a, b = self.delta.a, self.delta.b
        if a is None or b is None:
            return output
        if self.embedding:
            low = F.embedding(x, _like(a, output).T)
            scale: Any = getattr(self.module, "embed_scale", None)
            low = low if scale is None else low * scale
        else:
            low = F.linear(x.to(output.dtype), _like(a, output))
        return output + self.delta.scaling * F.linear(low, _like(b, output))

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias if self.delta.new_bias is None else self.delta.new_bias

    def _base(self, x: Tensor) -> Tensor:
        """The module's own computation, with `new_weight` and `new_bias` in place."""
        own: Tensor = self.module.weight  # type: ignore[assignment]
        given = {"weight": self.delta.new_weight, "bias": self.delta.new_bias}
        swapped = {f"module.{name}": _like(value, own) for name, value in given.items() if value is not None}
        late = swapped.pop("module.bias", None) if getattr(self.module, "bias", None) is None else None
        output: Tensor = torch.func.functional_call(_Bare(self.module), swapped, (x,))
        return output if late is None else output + late

    def _row_norms(self) -> Tensor:
        """Euclidean norms `[out]` of the rows of `W + scaling * b @ a`, float32 or wider."""
        weight = self.delta.new_weight
        matrix = weight_matrix(self.module) if weight is None else _matrix(self.module, weight)
        if self.delta.a is not None and self.delta.b is not None:
            matrix = matrix + self.delta.scaling * (_like(self.delta.b, matrix) @ _like(self.delta.a, matrix))
        norms: Tensor = matrix.norm(dim=1)
        return norms

    def _check(self) -> None:
        module, delta = self.module, self.delta
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        if weight is None:
            raise UnsupportedProgramError(f"{delta}: {kind} has no weight")
        if delta.a is not None or delta.magnitude is not None:
            if weight.ndim != 2:
                raise UnsupportedProgramError(f"{delta}: {kind} is neither a linear module nor an embedding")
            size = linear_size(module)
            if delta.a is not None and delta.b is not None and size != (delta.b.shape[0], delta.a.shape[1]):
                raise AdapterError(
                    f"{delta}: made for {delta.b.shape[0]} x {delta.a.shape[1]}, "
                    f"the base module is {size[0]} x {size[1]}"
                )
        if self.embedding and delta.input_scale is not None:
            raise UnsupportedProgramError(f"{delta}: the input of an embedding is token ids, which have no scale")
        if (delta.magnitude is not None or delta.replaces) and not weight.is_floating_point():
            raise UnsupportedProgramError(
                f"{delta}: the base module's weight is quantised ({weight.dtype}); load the base in a floating dtype"
            )
        own = {"weight": weight, "bias": getattr(module, "bias", None)}
        for name, value in (("weight", delta.new_weight), ("bias", delta.new_bias)):
            if value is not None and own[name] is not None and own[name].shape != value.shape:
                raise AdapterError(
                    f"{delta}: new_{name} has shape {list(value.shape)}, that of the base {list(own[name].shape)}"
                )


class _Bare(nn.Module):
    """Runs a module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module.forward(*args)


def linear_size(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a linear map; an embedding maps one-hot tokens."""
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if None not in sizes:
        return sizes  # type: ignore[return-value]
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if _transposed(module) else (rows, columns)


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight of a linear module or an embedding as `[out, in]`, float32 or wider."""
    return _matrix(module, module.weight)  # type: ignore[arg-type]


def _matrix(module: nn.Module, weight: Tensor) -> Tensor:
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.T if _transposed(module) else weight


def _transposed(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` stores the transpose, and an embedding a row per token."""
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)


def _hook(module: nn.Module, work: list[tuple[Group, Delta]], tokens: Tokens) -> Any:
    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        rows = tokens.slots.shape[0]
        for group, delta in work:
            everywhere = delta.delta.positions.everywhere
            if group.whole and everywhere:
                output = delta(x, output)
                continue
            if output.shape[0] != rows:
                if output.shape[0] != 1:
                    raise UnsupportedProgramError(
                        f"{delta.delta}: the module sees {output.shape[0]} rows of a batch of {rows}; "
                        f"run one adapter at a time, on all tokens"
                    )
                x, output = x.expand(rows, *x.shape[1:]), output.expand(rows, *output.shape[1:])
            if everywhere:
                index = torch.from_numpy(group.rows).to(output.device)
                output = output.index_copy(0, index, delta(x[index], output[index]))
            else:
                output = _at_positions(delta, tokens.chosen(delta.delta.positions, group, output.shape[1]), x, output)
        return output

    return after


def _at_positions(delta: Delta, chosen: Tensor | None, x: Tensor, output: Tensor) -> Tensor:
    if chosen is None:
        return delta(x, output)
    index = chosen.to(output.device)
    flat = output.flatten(0, 1)
    changed = delta(x.flatten(0, 1)[index], flat[index])
    return flat.index_copy(0, index, changed).view(output.shape)
