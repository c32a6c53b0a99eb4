"""Activations of a base model at chosen sites and tokens, for analysis, classifiers, and cached sources."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reft_plugins import plugins
from reft_plugins.errors import AdapterError, DataError
from reft_plugins.positions import Positions
from reft_plugins.program import COMPONENTS, Site

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.adapter import Adapter
    from reft_plugins.runtimes import Prompt

Pool = Literal["mean", "last"]


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """Activations of some tokens of some prompts.

    Attributes:
        activations: by site, float32 `[tokens, width]`, prompt after prompt; pooled `[prompts, width]`.
        prompts: int64 `[tokens]`, number of the prompt each row comes from.
        tokens: int64 `[tokens]`, index of the token in its prompt; pooled, how many tokens went into the row.
        pool: how the tokens of a prompt were made one row, None if they were not.
    """

    activations: Mapping[Site, Tensor]
    prompts: Tensor
    tokens: Tensor
    pool: Pool | None = None

    def save(self, path: str | Path, **facts: str) -> Path:
        """Write safetensors: `<layer>.<component>` for each site, `prompts`, `tokens`; the facts are its metadata."""
        import safetensors.torch

        sites = {f"{site.layer}.{site.component}": tensor for site, tensor in self.activations.items()}
        target, metadata = Path(path), {**facts, "pool": self.pool or "none"}
        partial = target.with_name(f".{target.name}.partial")
        safetensors.torch.save_file({**sites, "prompts": self.prompts, "tokens": self.tokens}, partial, metadata)
        partial.replace(target)
        return target


def capture(
    base: str | Path,
    prompts: Sequence[Prompt],
    sites: Sequence[Site | str],
    positions: str | Positions = "l1",
    *,
    adapter: Adapter | str | Path | None = None,
    pool: Pool | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = False,
) -> Captured:
    """Run prompts through a base model and keep its activations at some sites and tokens.

    Args:
        base: folder or hub id.
        prompts: texts, tokenized as a runtime does, or token ids.
        sites: `Site`s or texts such as `3:block_output`; a bare layer number means `block_output`.
        positions: which tokens of each prompt.
        adapter: run under this adapter; an edited site holds what the edit made of it.
        pool: `mean` over the tokens of each prompt, or the `last` of them, so that there is one row per prompt.
        batch_size: prompts per forward pass; dtype: of the base model; device: as torch names it.
        progress: show a bar on standard error.

    Raises:
        AdapterError: a site does not parse, or its layer is outside the base model.
        DataError: there is no prompt, one has no tokens, or none of its tokens is at `positions`.
        BaseMismatchError: the adapter belongs to another base model.
        UnsupportedProgramError: the base model has no such component.
    """
    import torch

    from reft_plugins.runtimes import admit

    chosen = list(dict.fromkeys(site if isinstance(site, Site) else parse_site(site) for site in sites))
    spec = Positions.parse(positions)
    if not chosen:
        raise AdapterError("no site to capture; name some, such as 3:block_output")
    runtime: Any = plugins.runtimes.get("transformers")(base, dtype=dtype, device=device)
    try:
        admitted = admit(adapter, runtime.identity)
        program = None if admitted is None else admitted.lower()
        rows = _tokenize(prompts, runtime.tokenizer)
        places = [_places(row, number, spec) for number, row in enumerate(rows)]
        executor = type(runtime).executor(runtime.model)
        found: dict[Site, list[Tensor]] = {site: [] for site in chosen}
        for start in _batches(len(rows), batch_size, progress):
            batch, wanted = rows[start : start + batch_size], places[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=runtime.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=runtime.device)
            programs, lengths = [program] * len(batch), torch.tensor([len(row) for row in batch])
            wide = executor.widen(programs, ids, mask)
            with (
                torch.inference_mode(),
                executor.run(programs, lengths),
                executor.capture(chosen) as captured,
            ):
                runtime.model(input_ids=wide.input_ids, attention_mask=wide.attention_mask, **_frugal(runtime.model))
            for site in chosen:
                hidden = captured[site][:, wide.extra :]
                found[site] += [_pooled(hidden[row, own].float().cpu(), pool) for row, own in enumerate(wanted)]
    finally:
        runtime.close()
    counts = [len(own) for own in places]
    numbers = torch.arange(len(rows))
    return Captured(
        {site: torch.cat(parts) for site, parts in found.items()},
        numbers if pool else numbers.repeat_interleave(torch.tensor(counts)),
        torch.tensor(counts) if pool else torch.tensor([token for own in places for token in own]),
        pool,
    )


def parse_site(text: str) -> Site:
    """Read `3:block_output`, or `3` for `block_output`.

    Raises:
        AdapterError: naming what does not parse.
    """
    layer, _, component = text.strip().partition(":")
    component = component or "block_output"
    if not layer.isdecimal():
        raise AdapterError(f"site {text!r}: write layer:component, such as 3:block_output")
    if component not in COMPONENTS:
        raise AdapterError(f"site {text!r}: unknown component {component!r}; known are {', '.join(COMPONENTS)}")
    return Site(int(layer), component)


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file: JSONL with a `prompt` per line if it is named `.jsonl`, otherwise one text per line.

    Raises:
        DataError: naming file and line.
    """
    from reft_plugins.training.data import read_fields

    path = Path(path)
    if path.suffix == ".jsonl":
        return [prompt for _, (prompt,) in read_fields(path, ("prompt",))]
    try:
        return [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the prompts: {error}") from None


def _tokenize(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    rows = [tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if not rows:
        raise DataError("there is no prompt to capture activations of")
    for number, row in enumerate(rows):
        if not row:
            raise DataError(f"prompt {number} has no tokens")
    return rows


def _places(row: Sequence[int], number: int, positions: Positions) -> list[int]:
    found = [token for start, stop in positions.within(len(row), 0, len(row)) for token in range(start, stop)]
    if not found:
        raise DataError(f"prompt {number} of {len(row)} tokens has none at positions {str(positions)!r}")
    return found


def _pooled(rows: Tensor, pool: Pool | None) -> Tensor:
    if pool is None:
        return rows
    return rows.mean(0, keepdim=True) if pool == "mean" else rows[-1:]


def _frugal(model: Any) -> dict[str, Any]:
    """What keeps a forward pass from computing more than activations."""
    parameters = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in parameters}


def _batches(count: int, size: int, progress: bool) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    yield from track(range(0, count, size), "capture", console=Console(stderr=True), disable=not progress)


def facts_of(base: str | Path, positions: str, prompts: Sequence[Prompt]) -> dict[str, str]:
    """What a file of activations says of itself: base model, its fingerprint, positions, digest of the prompts."""
    from reft_plugins.base_model import identify
    from reft_plugins.manifest import sha256

    identity = identify(base)
    return {
        "base": identity.name,
        "fingerprint": identity.fingerprint,
        "positions": str(Positions.parse(positions)),
        "prompts_sha256": sha256(json.dumps(list(prompts), ensure_ascii=False).encode()),
    }
