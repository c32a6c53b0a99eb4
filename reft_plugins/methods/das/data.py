"""Pairs of prompts: JSONL of `{"base": …, "source": …, "completion": …}`, with the completion after the exchange."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reft_plugins.errors import AdapterError, DataError
from reft_plugins.methods.das.config import DASConfig
from reft_plugins.methods.interchange.edits import single_positions, tokens_at
from reft_plugins.training.batches import Collator
from reft_plugins.training.data import Examples, digest_of_file, read_fields


@dataclass(frozen=True, slots=True)
class PairExample:
    """Token ids of one line: `prompt` is the base prompt; `exchange` has one flag per subspace."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    source: tuple[int, ...]
    exchange: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def read_pairs(config: DASConfig, path: str | Path, tokenizer: Any, max_length: int) -> Examples:
    """Read and tokenize pairs. A line may name the subspaces it exchanges: `"exchange": ["first"]`.

    A completion is what follows after the exchange, no end token is added to it: a rotation decides which part of the
    source comes through, it cannot make the model stop.

    Raises:
        DataError: naming file and line; also where a prompt has no token at the positions to be exchanged.
    """
    rows = []
    exchanges = _exchanges(path, config)
    for where, (base, source, completion) in read_fields(path, ("base", "source", "completion")):
        answer = tuple(tokenizer(completion, add_special_tokens=False).input_ids)
        row = PairExample(
            tuple(tokenizer(base).input_ids),
            answer,
            tuple(tokenizer(source).input_ids),
            exchanges.get(where, flags_of(config, config.exchanged)),
        )
        longest = max(len(row), len(row.source))
        if longest > max_length or not answer:
            raise DataError(f"{where}: {longest} tokens, {len(answer)} of them to be completed; limit {max_length}")
        for spec, prompt in ((config.positions, row.prompt), (config.read_positions, row.source)):
            try:
                tokens_at(single_positions(spec), len(prompt))
            except AdapterError:
                raise DataError(f"{where}: a prompt of {len(prompt)} tokens does not have all of {spec}") from None
        rows.append(row)
    if not rows:
        raise DataError(f'{path}: no examples; write one {{"base": "…", "source": "…", "completion": "…"}} per line')
    return Examples(tuple(rows), digest_of_file(path))


def _exchanges(path: str | Path, config: DASConfig) -> dict[str, tuple[bool, ...]]:
    """The subspaces that each line exchanges; lines that are no objects are left to the reader of the texts."""
    found = {}
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, ValueError):
        return {}
    for number, line in enumerate(lines, start=1):
        where = f"{Path(path)}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = {}
        names = row.get("exchange", config.exchanged) if isinstance(row, dict) else ()
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list | tuple) or (unknown := [name for name in names if name not in config.names]):
            known = ", ".join(config.names)
            raise DataError(f"{where}: field 'exchange' names no subspace: {unknown or names!r}; there are {known}")
        found[where] = flags_of(config, names)
    return found


def flags_of(config: DASConfig, names: Sequence[str]) -> tuple[bool, ...]:
    """One flag for each subspace: whether it is among `names`."""
    return tuple(name in names for name in config.names)


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Pads base prompts with completions as `Collator`, and adds the sources, padded behind."""

    base: Collator

    def __call__(self, examples: Sequence[PairExample]) -> dict[str, Any]:
        """As `Collator`; int64 `source_ids`, `source_mask` `[batch, tokens]`, bool `exchange` `[batch, subspaces]`."""
        width = max(len(row.source) for row in examples)
        batch = self.base(examples)  # type: ignore[arg-type]
        pads = [width - len(row.source) for row in examples]
        batch["source_ids"] = torch.tensor(
            [[*row.source, *[self.base.fill] * pad] for row, pad in zip(examples, pads, strict=True)]
        )
        batch["source_mask"] = torch.tensor(
            [[1] * len(row.source) + [0] * pad for row, pad in zip(examples, pads, strict=True)]
        )
        batch["exchange"] = torch.tensor([row.exchange for row in examples])
        return batch
