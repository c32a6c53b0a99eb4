"""The prediction head that AdapterHub saves with every adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.formats.adapterhub.files import Checkpoint, read_head
from reft_plugins.program import WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.base_model import BaseModel

_SHARED = {
    ".weight": (
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "bert.embeddings.word_embeddings.weight",
        "roberta.embeddings.word_embeddings.weight",
        "electra.embeddings.word_embeddings.weight",
        "distilbert.embeddings.word_embeddings.weight",
    ),
    ".decoder.bias": ("cls.predictions.bias", "lm_head.bias"),
}
"""What a language model's head shares its parameters with, under which name files may keep them alone."""


def head_of(checkpoint: Checkpoint) -> tuple[tuple[WeightDelta, ...], str, Path | None]:
    """Where the saved head differs from the base's own it is part of the adapter.

    Returns:
        weights that replace those of the base; a sentence on what was found; the file.
    """
    file, tensors = read_head(checkpoint.directory)
    base = checkpoint.base
    if file is None:
        return (), "no prediction head was saved", None
    if base is None:
        return (), f"{file.name} is left out: whether it is the base's own head shows with a base only", file
    same_class = checkpoint.document.get("model_class") == base.identity.architecture
    changed: dict[str, dict[str, Any]] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        own = _own(name, base)
        if own is not None and own.shape == tensor.shape and bool((own == tensor.to(own.dtype)).all()):
            continue
        if kind in ("weight", "bias") and (own is not None or same_class):
            changed.setdefault(module, {})[f"new_{kind}"] = tensor
        else:
            unknown.append(name)
    said = []
    if changed:
        said.append(f"the head in {file.name} differs from the base's and is kept: {', '.join(sorted(changed))}")
    if unknown:
        said.append(f"left out from {file.name}, because the base has no such head: {', '.join(sorted(unknown))}")
    deltas = tuple(WeightDelta(module, **found) for module, found in sorted(changed.items()))
    return deltas, "; ".join(said) or f"{file.name} is a copy of the base's own head", file


def _own(name: str, base: BaseModel) -> Tensor | None:
    """The base's tensor of this name, or the one that its head shares under another name."""
    if base.has(name):
        return base.tensor(name)
    if not name.startswith(("lm_head.", "cls.predictions.", "vocab_projector.")):
        return None
    others = next((names for ending, names in _SHARED.items() if name.endswith(ending)), ())
    tied = next((other for other in others if base.has(other)), None)
    return None if tied is None else base.tensor(tied)
