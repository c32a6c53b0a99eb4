"""Which token positions an edit touches: the one grammar and the one resolver that every runtime uses.

Grammar: `all` | `prompt` | `generated` | `f7` | `l7` | `f7+l7` | `[0,5,-1]`, then options after `;`:

- `cap=half`  prefix and suffix are each clipped to half the prompt, rounded down (pyreft);
- `trim=N`    the last N prompt tokens are outside (pyreft's supervised data sets use `trim=1`).

Indices count prompt tokens only, from the first real one: never padding, never generated tokens. Where parts of one
specification overlap, the positions are their union and are edited once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from reft_plugins.errors import PositionsError

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

OPEN_END = int(np.iinfo(np.int64).max)
"""The stop of an interval that also holds every token still to be generated."""

_KEYWORDS = ("all", "prompt", "generated")
_GROUP = re.compile(r"([fl])([1-9][0-9]{0,8})")
_INDICES = re.compile(r"\[\s*-?[0-9]{1,9}(\s*,\s*-?[0-9]{1,9})*\s*\]")
_GRAMMAR = "all, prompt, generated, f7, l7, f7+l7 or [0,5,-1], optionally followed by ;cap=half or ;trim=1"


@dataclass(frozen=True, slots=True)
class Positions:
    """A parsed specification. Build it with `Positions.parse`; `str(positions)` is canonical and parses back.

    Attributes:
        keyword: `all`, `prompt` or `generated`, else None.
        first, last: sizes of the prefix and the suffix in tokens, 0 where absent.
        indices: explicit positions; negative ones count from the end of the (trimmed) prompt.
        cap_half: clip `first` and `last` to half the prompt each.
        trim: number of tokens at the end of the prompt that are outside.
    """

    keyword: str | None = None
    first: int = 0
    last: int = 0
    indices: tuple[int, ...] = ()
    cap_half: bool = False
    trim: int = 0

    @classmethod
    def parse(cls, spec: str | Positions) -> Positions:
        """Parse a specification.

        Raises:
            PositionsError: naming the part that does not parse.
        """
        if isinstance(spec, Positions):
            return spec
        if not isinstance(spec, str):
            raise PositionsError(f"positions must be text such as 'f7+l7', not {type(spec).__name__}")
        return _parse(spec)

    def __str__(self) -> str:
        groups = [f"{letter}{size}" for letter, size in (("f", self.first), ("l", self.last)) if size]
        body = self.keyword or "+".join(groups) or f"[{','.join(map(str, self.indices))}]"
        return body + (";cap=half" if self.cap_half else "") + (f";trim={self.trim}" if self.trim else "")

    @property
    def prompt_only(self) -> bool:
        """True when no generated token is ever touched."""
        return self.keyword in (None, "prompt")

    @property
    def everywhere(self) -> bool:
        """True when every token, prompt and generated, is touched."""
        return self.keyword == "all"

    def parts(self) -> tuple[Positions, ...]:
        """The prefix and the suffix on their own, for methods that learn parameters for each (pyreft: not shared)."""
        if self.first and self.last:
            return replace(self, last=0), replace(self, first=0)
        return (self,)

    def resolve(self, prompt_len: int | npt.ArrayLike) -> Int64Array:
        """The edited intervals of prompts of the given lengths.

        Args:
            prompt_len: one length or an array `[...]` of lengths, in tokens, of the original prompts.

        Returns:
            int64 `[..., k, 2]`: `k` disjoint half-open `(start, stop)` intervals in ascending order, empty ones with
            `start == stop`; `stop` is `OPEN_END` where generated tokens belong to it.
        """
        length = np.asarray(prompt_len, dtype=np.int64)
        end = np.maximum(length - self.trim, 0)
        zero = np.zeros_like(end)
        if self.keyword == "all":
            bounds = [(zero, np.full_like(end, OPEN_END))]
        elif self.keyword == "prompt":
            bounds = [(zero, end)]
        elif self.keyword == "generated":
            bounds = [(length, np.full_like(end, OPEN_END))]
        elif self.indices:
            starts = [end + index if index < 0 else zero + index for index in self.indices]
            inside = [(start >= 0) & (start < end) for start in starts]
            bounds = [(np.where(ok, s, end), np.where(ok, s + 1, end)) for s, ok in zip(starts, inside, strict=True)]
        else:
            limit = end // 2 if self.cap_half else end
            bounds = []
            if self.first:
                bounds.append((zero, np.minimum(self.first, limit)))
            if self.last:
                bounds.append((end - np.minimum(self.last, limit), end))
        return _union(np.stack([np.stack(pair, axis=-1) for pair in bounds], axis=-2))

    def mask(self, token_positions: npt.ArrayLike, prompt_len: npt.ArrayLike) -> BoolArray:
        """Which tokens are edited.

        Args:
            token_positions: int `[...]`, index of each token in its own sequence; negative for padding.
            prompt_len: int, broadcastable to `token_positions`: length of the original prompt of each token.

        Returns:
            bool, the broadcast shape; padding is never edited.
        """
        position = np.asarray(token_positions, dtype=np.int64)[..., None]
        intervals = self.resolve(prompt_len)
        inside: BoolArray = np.any((position >= intervals[..., 0]) & (position < intervals[..., 1]), axis=-1)
        return np.asarray(inside & (position[..., 0] >= 0))

    def within(self, prompt_len: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """The edited intervals inside tokens `[start, stop)`, relative to `start`; empty when none is edited there."""
        clipped = np.clip(self.resolve(prompt_len), start, stop) - start
        return tuple((int(low), int(high)) for low, high in clipped if low < high)


def _union(intervals: Int64Array) -> Int64Array:
    """Make `[..., k, 2]` intervals disjoint and ascending by cutting what an earlier one already covers."""
    order = np.argsort(intervals[..., 0], axis=-1, kind="stable")
    ordered = np.take_along_axis(intervals, order[..., None], axis=-2)
    reached = np.maximum.accumulate(ordered[..., 1], axis=-1)
    start = ordered[..., 0].copy()
    start[..., 1:] = np.maximum(start[..., 1:], reached[..., :-1])
    return np.stack([start, np.maximum(ordered[..., 1], start)], axis=-1)


@lru_cache(maxsize=4096)
def _parse(spec: str) -> Positions:
    body, *options = (part.strip() for part in spec.split(";"))
    fields: dict[str, int | bool | str | tuple[int, ...]] = {}
    if body in _KEYWORDS:
        fields["keyword"] = body
    elif _INDICES.fullmatch(body):
        fields["indices"] = tuple(int(index) for index in body[1:-1].split(","))
    else:
        for part in body.split("+"):
            match = _GROUP.fullmatch(part.strip())
            name = {"f": "first", "l": "last"}[match[1]] if match else ""
            if match is None or name in fields:
                raise PositionsError(f"positions {spec!r}: cannot read {part!r}. Write {_GRAMMAR}")
            fields[name] = int(match[2])
    for option in options:
        if option == "cap=half" and ("first" in fields or "last" in fields):
            fields["cap_half"] = True
        elif re.fullmatch(r"trim=[0-9]{1,9}", option) and body not in ("all", "generated"):
            fields["trim"] = int(option.removeprefix("trim="))
        else:
            raise PositionsError(f"positions {spec!r}: option {option!r} does not apply here. Write {_GRAMMAR}")
    return Positions(**fields)  # type: ignore[arg-type]
