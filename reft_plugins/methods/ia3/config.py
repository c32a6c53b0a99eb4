"""Settings of IA3."""

from __future__ import annotations

from pydantic import model_validator

from reft_plugins.methods._weights import PeftConfig


class IA3Config(PeftConfig):
    """Scales of the outputs of `target_modules`, and of the inputs of those that are also `feedforward_modules`.

    Left out, both are what PEFT knows for the architecture: keys, values and the MLP's last matrix, as in the paper.
    """

    target_modules: str | tuple[str, ...] | None = None  # type: ignore[assignment]
    feedforward_modules: str | tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> IA3Config:
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ValueError("target_modules and feedforward_modules are given together; the second may be empty")
        return self
