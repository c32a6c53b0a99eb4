"""Modules of a base model by name, from its configuration alone: which exist, of what kind, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError, BaseModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class BaseModules:
    """What a base model has that an adapter can name.

    Attributes:
        kinds: class of every module that has parameters of its own, by qualified name in transformers.
        shapes: shapes of all parameters by name.
        embedding, head: names of the input embedding and of the output layer, where they are known.
        tied: whether these two share one weight.
    """

    base: BaseModel
    kinds: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    embedding: str | None
    head: str | None
    tied: bool

    @classmethod
    def of(cls, base: BaseModel) -> BaseModules:
        """Look at the modules of a base model, without its weights.

        Raises:
            BaseModelError: transformers does not know the architecture.
        """
        stat = (base.directory / "config.json").stat()
        kinds, shapes, embedding, head, tied = _structure(base.directory, stat.st_mtime_ns)
        return cls(base, kinds, shapes, embedding, head, tied)

    def resolve(self, name: str, where: Path) -> str:
        """The base's own name of a module that a file names, which may lack or add the first parts of the name.

        Args:
            where: the file, named in errors.

        Raises:
            AdapterError: when no module or several fit.
        """
        if name in self.kinds:
            return name
        fitting = [own for own in self.kinds if own.endswith(f".{name}") or name.endswith(f".{own}")]
        if len(fitting) == 1:
            return fitting[0]
        last = name.rpartition(".")[2]
        alike = [own for own in self.kinds if own.rpartition(".")[2] == last][:_SHOWN]
        has = f"it has {', '.join(alike)}, …" if alike else f"it has {', '.join(list(self.kinds)[:_SHOWN])}, …"
        raise AdapterError(
            f"{where}: the base model {self.base.identity.name} has no module {name!r}; {has} "
            "Was the adapter trained on another base?"
        )

    def is_embedding(self, module: str) -> bool:
        """Whether a module looks tokens or positions up."""
        return "Embedding" in self.kinds.get(module, "")

    def is_transposed(self, module: str) -> bool:
        """Whether a linear module keeps its weight as `[in, out]` (GPT-2)."""
        return self.kinds.get(module) == "Conv1D"

    def parameter(self, name: str) -> Tensor:
        """A parameter of the base by name, in its stored dtype and layout.

        Raises:
            BaseModelError: when the base has none of this name.
        """
        if self.tied and self.head is not None and name == f"{self.head}.weight" and not self.base.has(name):
            name = f"{self.embedding}.weight"
        return self.base.tensor(name)

    def matrix(self, module: str) -> Tensor:
        """The weight of a linear module or an embedding as float32 `[out, in]`."""
        weight = self.parameter(f"{module}.weight").float()
        return weight.T if self.is_transposed(module) or self.is_embedding(module) else weight


@lru_cache(maxsize=8)
def _structure(
    directory: Path, stamp: int
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], str | None, str | None, bool]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            model = build(config)
    except Exception as error:
        raise BaseModelError(f"{directory}: transformers cannot build this base model: {error}") from error
    names = {id(module): name for name, module in model.named_modules()}
    kinds = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters(recurse=False))
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    embedding, head = (_name(names, find()) for find in (model.get_input_embeddings, model.get_output_embeddings))
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    return kinds, shapes, embedding, head, tied


def _name(names: dict[int, str], module: nn.Module | Any) -> str | None:
    return names.get(id(module))
