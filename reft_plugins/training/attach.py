"""Training a method by running its own program with gradients: what `Method.attach` does unless overridden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reft_plugins import plugins

if TYPE_CHECKING:
    from reft_plugins.manifest import BaseModelIdentity
    from reft_plugins.methods import Method


class ProgramTrainable:
    """A base model that executes a method's program, lowered once per forward pass; see `methods.Trainable`.

    Args:
        method: offers `parameters` and `lower`.
        model: loaded base model of transformers, frozen by the caller.
        config: settings of the method; base: identity of `model`.
        parameters: for methods whose own need more than settings, such as weights of `model`; by default
            `method.parameters(config, base)`.
    """

    def __init__(
        self,
        method: Method[Any],
        model: nn.Module,
        config: Any,
        base: BaseModelIdentity,
        parameters: nn.Module | None = None,
    ) -> None:
        self.parameters: Any = method.parameters(config, base) if parameters is None else parameters
        self.model = _ProgramModel(method, model, config, self.parameters)

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """Set the prompt lengths, int64 `[batch]`, of the next forward pass."""
        self.model.prompt_lengths = prompt_lengths

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store."""
        tensors: dict[str, Tensor] = self.parameters.tensors()
        return tensors


class _ProgramModel(nn.Module):
    def __init__(self, method: Method[Any], base: nn.Module, config: Any, learned: nn.Module) -> None:
        super().__init__()
        self.base, self.learned = base, learned
        self.prompt_lengths: Tensor | None = None
        self._method, self._config = method, config
        self._executor = plugins.runtimes.get("transformers").executor(base)  # type: ignore[attr-defined]

    def forward(self, **batch: Any) -> Any:
        assert self.prompt_lengths is not None, "begin_batch() comes before every forward pass"
        program = self._method.lower(self._config, self.learned.tensors())  # type: ignore[operator]
        programs = [program] * len(self.prompt_lengths)
        rows = {name: batch.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
        width = batch["input_ids"].shape[1]
        wide = self._executor.widen(programs, **rows)
        if wide.extra:
            batch |= {name: getattr(wide, name) for name in rows}
        with self._executor.run(programs, self.prompt_lengths):
            outputs = self.base(**batch)
        if wide.extra:
            outputs.logits = outputs.logits[:, -width:]
        return outputs
