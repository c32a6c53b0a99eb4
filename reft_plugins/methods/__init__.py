"""Fine-tuning methods. Each folder here is one; `Method` is what a plugin implements to add another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reft_plugins.manifest import BaseModelIdentity
    from reft_plugins.program import Program
    from reft_plugins.training.data import Examples


class MethodConfig(BaseModel):
    """Settings of a method: what `reft train` accepts and the manifest keeps. Unknown settings are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Parameters(Protocol):
    """A trainable module that hands out the tensors an adapter stores, connected to its parameters."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by the names `Method.lower` reads; gradients flow through them to the parameters."""


class Trainable(Protocol):
    """A base model with a method attached.

    It offers the module that the training loop runs, and the parameters that are learned.
    """

    @property
    def model(self) -> nn.Module:
        """What the training loop runs: `model(**batch).logits`."""

    @property
    def parameters(self) -> nn.Module:
        """Holds exactly what is learned; its `state_dict` is what a checkpoint keeps."""

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """Called before every forward pass with int64 `[batch]`: how many tokens of each row are its prompt."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store."""


@runtime_checkable
class Staged(Protocol):
    """What a `Trainable` also offers where its training goes through stages."""

    def begin_training(self, steps: int) -> None:
        """Called before the first step, and again when training is resumed, with the optimizer steps of the whole run.

        Raises:
            TrainingError: when the stages do not fit into so many steps.
        """

    def end_step(self, step: int) -> None:
        """Called after optimizer step number `step`, counted from 1, while its gradients are still there."""


@runtime_checkable
class ClosedForm(Protocol):
    """What a `Trainable` also offers where its parameters are computed from the data, without gradients."""

    def fit(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Set the parameters from one pass over the training data, as `Method.collator` batches it.

        Returns:
            measures of the fit, for the manifest.
        """

    def evaluate(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Measures of the parameters on held-out data."""


class Method(ABC, Generic[ConfigT]):
    """A way of learning parameters, and what they do to the base model.

    A method that learns the parameters of a program needs `parameters` and `lower` only: it is trained by running its
    own program with gradients. One whose training belongs to a library overrides `attach` as well.
    """

    name: ClassVar[str]
    config: ClassVar[type[Any]]
    learning_rate: ClassVar[float] = 1e-3
    """What `reft train` uses unless told otherwise."""

    @abstractmethod
    def lower(self, config: ConfigT, tensors: Mapping[str, Tensor]) -> Program:
        """The program for stored tensors; differentiable. A missing tensor raises KeyError with its name."""

    def parameters(self, config: ConfigT, base: BaseModelIdentity) -> nn.Module:
        """Freshly initialised trainable module that satisfies `Parameters`."""
        raise NotImplementedError(f"method {self.name!r} defines neither parameters() nor attach()")

    def attach(self, model: nn.Module, config: ConfigT, base: BaseModelIdentity) -> Trainable:
        """Put the method onto a loaded base model for training; by default by executing its program."""
        from reft_plugins.training.attach import ProgramTrainable

        trainable: Trainable = ProgramTrainable(self, model, config, base)
        return trainable

    def examples(self, config: ConfigT, path: str | Path, tokenizer: Any, max_length: int) -> Examples:
        """Read training data; by default prompts and completions. Override for data with more in it.

        Raises:
            DataError: naming file and line.
        """
        from reft_plugins.training.data import read_examples

        return read_examples(path, tokenizer, max_length)

    def collator(self, config: ConfigT, fill: int, left: bool) -> Callable[[Any], dict[str, Tensor]]:
        """What pads a list of examples into a batch; its tensors reach `Trainable.model` by name."""
        from reft_plugins.training.batches import Collator

        return Collator(fill=fill, left=left)
