"""Feature extraction: one pooled hidden state per text, from a base model with or without an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from reft_plugins import plugins
from reft_plugins.base_model import attention_implementation, check_base, identify, locate, read_config
from reft_plugins.classification.models import open_classifier
from reft_plugins.errors import BaseModelError, DataError, UnsupportedProgramError
from reft_plugins.layers import decoder_layers
from reft_plugins.loading import load
from reft_plugins.program import Program, WeightDelta
from reft_plugins.training.data import digest_of_file, read_fields

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter

Pool = Literal["mean", "last", "first", "cls"]
POOLS: tuple[str, ...] = get_args(Pool)


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Pooled hidden states of texts.

    Attributes:
        values: float32 `[texts, hidden]`, in the order of the texts.
        labels: one per text, or None where the data has none.
        provenance: base model, layer, pooling, and digests of adapter and data.
    """

    values: npt.NDArray[np.float32]
    labels: tuple[str, ...] | None
    provenance: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write `.safetensors` (`features`, `label_ids`; label names and provenance in the metadata) or `.npz`.

        Raises:
            DataError: another ending.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = sorted(set(self.labels or ()))
        numbers = np.array([names.index(label) for label in self.labels or ()], dtype=np.int64)
        about = {"labels": json.dumps(names), "provenance": json.dumps(self.provenance, sort_keys=True)}
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            tensors: dict[str, Any] = {"features": self.values, **({"label_ids": numbers} if self.labels else {})}
            save_file(tensors, path, metadata=about)
        elif path.suffix == ".npz":
            arrays: dict[str, Any] = {"features": self.values, "provenance": np.array(about["provenance"])}
            arrays |= {"labels": np.array(self.labels)} if self.labels else {}
            np.savez(path, **arrays)
        else:
            raise DataError(f"{path}: features are written as .safetensors or .npz")
        return path


def extract(
    base: str | Path,
    data: str | Path,
    *,
    layer: int = -1,
    pool: Pool = "mean",
    adapter: Adapter | str | Path | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = False,
) -> Features:
    """One vector for every text of a JSONL file.

    Args:
        base: folder or hub id of a causal or BERT-like model.
        data: JSONL with `text` and perhaps `label` per line.
        layer: whose output is read, counted from 0, negative from the end; -1 is the model's last hidden state, after
            the final normalisation where there is one.
        pool: `mean` over the text's tokens, its `last` or `first` token, or the tokenizer's `cls` token.
        adapter: works while the texts are read; what it does to the head does not matter here.
        max_length: most tokens of a text, by default the base model's context; a longer one is an error.
        device: as torch names it, by default a GPU if there is one.

    Raises:
        DataError: naming file and line; BaseModelError: no such layer, or no token to pool.
        UnsupportedProgramError: the adapter puts learned tokens in front of a text.
    """
    from transformers import AutoTokenizer

    if pool not in POOLS:
        raise DataError(f"pool {pool!r} is unknown; known are {', '.join(POOLS)}")
    directory, identity = locate(base), identify(base)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts, labels = _read(data)
    rows = _tokenize(texts, tokenizer, max_length or _context(directory), data)
    fill = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    model = _open(directory, fill, dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    admitted = None if adapter is None else load(adapter)
    if admitted is not None:
        check_base(admitted.manifest, identity)
    program = None if admitted is None else _on_backbone(admitted.lower(), model)
    values = np.empty((len(rows), identity.hidden_size), dtype=np.float32)
    state = _state(model, layer)
    with torch.inference_mode():
        for batch in _batches(rows, batch_size, progress):
            lengths = torch.tensor([len(rows[row]) for row in batch])
            width = int(lengths.max())
            tokens = torch.tensor([[*rows[row], *[fill] * (width - len(rows[row]))] for row in batch])
            mask = torch.arange(width) < lengths[:, None]
            with state.executor.run([program] * len(batch), lengths):
                hidden = state.of(tokens.to(device), mask.long().to(device))
            values[batch] = _pool(hidden.float().cpu(), tokens, mask, pool, tokenizer).numpy()
    provenance = {
        "base": identity.model_dump(mode="json"),
        "adapter": None if admitted is None else admitted.digest,
        "data_sha256": digest_of_file(data),
        "layer": layer,
        "pool": pool,
        "dtype": dtype,
    }
    return Features(values, labels, provenance)


def _read(data: str | Path) -> tuple[list[str], tuple[str, ...] | None]:
    """Texts, and labels if the first line has one."""
    fields = ("text", "label") if _labelled(Path(data)) else ("text",)
    rows = [row for _, row in read_fields(data, fields)]
    if not rows:
        raise DataError(f'{data}: no texts; write one {{"text": "…"}} per line')
    return [row[0] for row in rows], tuple(row[1] for row in rows) if len(fields) > 1 else None


def _labelled(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"null")
        return "label" in (json.loads(first.decode("utf-8-sig")) or {})
    except (OSError, ValueError, TypeError):
        return False  # said with file and line when the texts are read


def _tokenize(texts: Sequence[str], tokenizer: Any, limit: int, data: str | Path) -> list[list[int]]:
    rows = [list(ids) for ids in tokenizer(list(texts)).input_ids]
    for number, row in enumerate(rows, start=1):
        if not 0 < len(row) <= limit:
            raise DataError(f"{data}, text {number}: {len(row)} tokens; at least one and at most {limit} are needed")
    return rows


def _context(directory: Path) -> int:
    config = read_config(directory)
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 2**31)


def _open(directory: Path, fill: int, dtype: str) -> Any:
    """The model under a head, which is not used, but makes module names those that adapters know."""
    from transformers import AutoModelForCausalLM

    loading = {"dtype": getattr(torch, dtype), "attn_implementation": attention_implementation(directory)}
    architecture = (read_config(directory).get("architectures") or [""])[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM.from_pretrained(directory, **loading)
    with torch.random.fork_rng(devices=[]):
        return open_classifier(directory, ("0", "1"), fill, **loading)


def _on_backbone(program: Program, model: Any) -> Program:
    """Without what happens behind the hidden states.

    Raises:
        UnsupportedProgramError: learned tokens in front of the text.
    """
    if program.virtual_tokens:
        raise UnsupportedProgramError(
            "learned tokens in front of a text are no part of it to pool over; extract features with an adapter that "
            "edits representations or weights"
        )
    backbone = f"{model.base_model_prefix}."
    return Program(tuple(n for n in program if not isinstance(n, WeightDelta) or n.module.startswith(backbone)))


class _State:
    """Runs a model and keeps what one of its modules puts out."""

    def __init__(self, model: Any) -> None:
        self.executor: Any = plugins.runtimes.get("transformers").executor(model)  # type: ignore[attr-defined]
        self.output: Any = None
        self._model = model
        taken = signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._module: nn.Module = model

    def of(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The state `[texts, tokens, hidden]`; the hook comes last, so it sees what an adapter made of it."""
        handle = self._module.register_forward_hook(self._keep)
        try:
            self._model(input_ids=tokens, attention_mask=mask, **self._options)
        finally:
            handle.remove()
        state: Tensor = self.output if isinstance(self.output, Tensor) else self.output[0]
        return state

    def at(self, module: nn.Module) -> _State:
        self._module = module
        return self

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output


def _state(model: Any, layer: int) -> _State:
    """What keeps the output of a layer, or for -1 that of the whole backbone.

    Raises:
        BaseModelError: the model has no such layer.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    if not -count <= layer < count:
        raise BaseModelError(f"layer {layer}: the base model has layers 0 to {count - 1}, or -{count} to -1")
    module = model.base_model if layer == -1 else decoder_layers(model, count)[1][layer]
    return _State(model).at(module)


def _batches(rows: Sequence[Sequence[int]], size: int, progress: bool) -> Iterator[list[int]]:
    """Numbers of texts of like length together, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
    starts = range(0, len(order), size)
    for start in track(starts, "reading", console=Console(stderr=True), disable=not progress):
        yield order[start : start + size]


def _pool(hidden: Tensor, tokens: Tensor, mask: Tensor, pool: str, tokenizer: Any) -> Tensor:
    """One vector `[texts, hidden]` of states `[texts, tokens, hidden]`; padding is behind.

    Raises:
        BaseModelError: `cls` where the tokenizer has no such token, or does not put it into texts.
    """
    if pool == "mean":
        weights = mask[..., None].float()
        return (hidden * weights).sum(1) / weights.sum(1)
    if pool == "first":
        return hidden[:, 0]
    if pool == "last":
        return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    found = tokens == (-1 if tokenizer.cls_token_id is None else tokenizer.cls_token_id)
    if not found.any(1).all():
        raise BaseModelError("pool 'cls': the base model's tokenizer puts no such token into texts; pool mean or last")
    return hidden[torch.arange(len(hidden)), found.int().argmax(1)]
