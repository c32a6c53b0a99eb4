"""Runs `KeyValuePrefix` nodes inside transformers' attention.

While a batch with prefixes runs, the model's attention implementation is one of ours. It hands queries, keys, values
and mask to the implementation that was there before (sdpa, or the eager function of the model's own file with its soft
caps and scalings), after putting prefixes in front of the keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.program import KeyValuePrefix
from reft_transformers.components import Components
from reft_transformers.hooks import Hook, on_output
from reft_transformers.tokens import Group, Tokens

MASKS: dict[str, Callable[..., Any]] = {"sdpa": sdpa_mask, "eager": eager_mask}
"""Attention implementations that take prefixes, with the functions that make their masks."""


class Prefixes:
    """The prefixes of one layer, of all programs of a batch."""

    def __init__(self, module: nn.Module, tokens: Tokens) -> None:
        self.module, self.tokens = module, tokens
        self.joined: list[tuple[Group, KeyValuePrefix]] = []
        self.gated: list[tuple[Group, KeyValuePrefix]] = []
        self._behind: list[Tensor] = []

    def add(self, group: Group, prefix: KeyValuePrefix) -> None:
        """Take in a prefix."""
        (self.joined if prefix.gate is None else self.gated).append((group, prefix))

    def attention(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Attention `[rows, tokens, heads, head_dim]` with the prefixes; see transformers' `AttentionInterface`."""
        module, query, key, value, mask, *rest = args
        for _, prefix in (*self.joined, *self.gated):
            if prefix.keys.shape[1:] != (key.shape[1], key.shape[3]):
                raise AdapterError(
                    f"{prefix}: made for {prefix.keys.shape[1]} key/value heads of {prefix.keys.shape[2]}, "
                    f"the base model has {key.shape[1]} of {key.shape[3]}"
                )
        if self.joined:
            own = key.shape[2]
            mask = self._widened(mask, query, own, kwargs.get("sliding_window"))
            key = torch.cat([self._in_front(key, "keys"), key], dim=2)
            value = torch.cat([self._in_front(value, "values"), value], dim=2)
        output, weights = original(module, query, key, value, mask, *rest, **kwargs)
        scaling = kwargs.get("scaling")
        for group, prefix in self.gated:
            extra = gated_attention(prefix, query, query.shape[-1] ** -0.5 if scaling is None else scaling, group)
            if prefix.projected:
                output = output + extra
            else:
                self._behind.append(extra.flatten(2))
        return output, weights

    def behind(self, output: Tensor) -> Tensor:
        """The attention's output after the projection, with the prefixes that are added there."""
        while self._behind:
            extra = self._behind.pop()
            if extra.shape != output.shape:
                raise UnsupportedProgramError(
                    f"a gated prefix without projection adds {extra.shape[-1]} numbers to an attention output of "
                    f"{output.shape[-1]}: in this base its heads are not as wide as its hidden states. Make it with "
                    "projected=True"
                )
            output = output + extra.to(output.dtype)
        return output

    @property
    def _length(self) -> int:
        return max(len(prefix.keys) for _, prefix in self.joined)

    def _in_front(self, state: Tensor, name: str) -> Tensor:
        """Prefix keys or values `[rows, kv_heads, n, head_dim]`, zeros behind the shorter ones."""
        front = state.new_zeros(state.shape[0], state.shape[1], self._length, state.shape[3])
        for group, prefix in self.joined:
            pairs = getattr(prefix, name).to(state).transpose(0, 1)
            padded = F.pad(pairs, (0, 0, 0, self._length - pairs.shape[1]))
            expanded = padded.expand(len(group.rows), -1, -1, -1)
            front = expanded if group.whole else front.index_copy(0, _rows(group, state), expanded)
        return front

    def _widened(self, mask: Tensor | None, query: Tensor, keys: int, window: int | None) -> Tensor:
        """The mask `[rows, 1, tokens, n + keys]`, which lets a row see its own prefix as far as its window reaches."""
        rows, count = query.shape[0], query.shape[2]
        if mask is None:
            mask = query.new_ones(rows, 1, count, keys, dtype=torch.bool)
        column = torch.arange(self._length, device=query.device)
        lengths = torch.zeros(rows, dtype=torch.int64)
        for group, prefix in self.joined:
            lengths[torch.from_numpy(group.rows)] = len(prefix.keys)
        lengths = lengths.to(query.device)[:, None, None, None]
        seen = (column < lengths).expand(rows, 1, count, -1)
        if window is not None:
            slots = torch.from_numpy(self.tokens.slots.clip(0)).to(query.device)[:, None, :, None]
            seen = seen & (slots + lengths - column < window)
        if mask.dtype != torch.bool:
            seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(
                ~seen, torch.finfo(mask.dtype).min
            )
        return torch.cat([seen, mask[..., :keys].expand(rows, -1, -1, -1)], dim=-1)


def gated_attention(prefix: KeyValuePrefix, query: Tensor, scaling: float, group: Group) -> Tensor:
    """`gate * softmax(q K^T * scaling) V` as `[rows, tokens, heads, head_dim]`, zero in rows outside the group.

    Args:
        query: `[rows, heads, tokens, head_dim]`, after the rotary embedding.
    """
    assert prefix.gate is not None
    index = None if group.whole else _rows(group, query)
    own = query if index is None else query[index]
    repeats = query.shape[1] // prefix.keys.shape[1]
    keys, values = (
        state.to(query).transpose(0, 1).repeat_interleave(repeats, dim=0) for state in (prefix.keys, prefix.values)
    )
    weights = F.softmax(own @ keys.transpose(1, 2) * scaling, dim=-1, dtype=torch.float32)
    gate = prefix.gate.to(weights).view(1, -1, 1, 1)
    extra = ((gate * weights).to(query.dtype) @ values).transpose(1, 2)
    if index is None:
        return extra
    whole = extra.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    return whole.index_copy(0, index, extra)


def _rows(group: Group, like: Tensor) -> Tensor:
    return torch.from_numpy(group.rows).to(like.device)


def prefixes_of(components: Components, tokens: Tokens) -> dict[nn.Module, Prefixes]:
    """The prefixes of a batch by attention module.

    Raises:
        UnsupportedProgramError: the model's attention takes none.
    """
    found: dict[nn.Module, Prefixes] = {}
    for group in tokens.groups:
        for prefix in group.program.prefixes:
            module = components.attention(prefix.layer)
            found.setdefault(module, Prefixes(module, tokens)).add(group, prefix)
    for module in found:
        name = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if str(name).removeprefix("reft_") not in MASKS:
            raise UnsupportedProgramError(
                f"{type(module).__name__} runs attention {name!r}; prefixes are executed with {' or '.join(MASKS)}: "
                f"open the base with one of them"
            )
        if str(name).endswith("eager"):
            _eager(module)
    return found


def projection_hooks(components: Components, tokens: Tokens) -> Iterator[tuple[int, nn.Module]]:
    """Layers and output projections of the prefixes that are added behind the projection."""
    layers = {p.layer for g in tokens.groups for p in g.program.prefixes if p.gate is not None and not p.projected}
    for layer in sorted(layers):
        yield layer, components.attention_projection(layer)


@contextmanager
def attending(components: Components, tokens: Tokens) -> Iterator[list[Hook]]:
    """Let the attention modules see the prefixes of a batch inside the block; yields hooks to install."""
    found = prefixes_of(components, tokens)
    if not found:
        yield []
        return
    hooks = [
        on_output(projection, found[components.attention(layer)].behind)
        for layer, projection in projection_hooks(components, tokens)
    ]
    configs = {id(c): c for c in (getattr(m, "config", None) for m in components.model.modules()) if c is not None}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    outer = {module: _ACTIVE.get(module) for module in found}
    _ACTIVE.update(found)
    try:
        for key, config in configs.items():
            if before[key] in MASKS:
                config._attn_implementation_internal = f"reft_{before[key]}"
        yield hooks
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module, previous in outer.items():
            if previous is None:
                _ACTIVE.pop(module, None)
            else:
                _ACTIVE[module] = previous


_IMPLEMENTATIONS: Any = AttentionInterface()  # type: ignore[no-untyped-call]
_ACTIVE: WeakKeyDictionary[nn.Module, Prefixes] = WeakKeyDictionary()


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that a module comes from."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None or getattr(module, "reorder_and_upcast_attn", False):
        raise UnsupportedProgramError(
            f"{type(module).__name__} computes eager attention in its own way, without a function that prefixes could "
            f"pass through; open the base with attention='sdpa'"
        )
    return function  # type: ignore[no-any-return]


def _attention(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    original = _eager(module) if name == "eager" else _IMPLEMENTATIONS[name]
    prefixes = _ACTIVE.get(module)
    if prefixes is None:
        return original(module, *args, **kwargs)
    names = ("query", "key", "value", "attention_mask")
    given = [*args, *(kwargs.pop(name) for name in names[len(args) :])]
    return prefixes.attention(original, module, *given, **kwargs)


def _mask(name: str, *args: Any, **kwargs: Any) -> Any:
    """A mask that is always written out: there is none to widen where transformers leaves it to a flag."""
    return MASKS[name](*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


for _name in MASKS:
    AttentionInterface.register(f"reft_{_name}", partial(_attention, _name))
    AttentionMaskInterface.register(f"reft_{_name}", partial(_mask, _name))
