"""Settings of AdaLoRA."""

from __future__ import annotations

from pydantic import Field

from reft_plugins.methods._weights import LowRankPeftConfig


class AdaLoRAConfig(LowRankPeftConfig):
    """Every one of `target_modules` starts with `initial_rank`; at the end they have `target_rank`, less, on average.

    Ranks stay as they are for `tinit` steps and after the last `tfinal` steps have begun (by default a tenth and half
    of all steps, about the paper's shares); in between the least important directions go, every `delta_t` steps.
    `beta1` and `beta2` average importance and its uncertainty over steps; `orth_reg_weight` keeps directions
    orthogonal. The scaling is `alpha / initial_rank`, with `alpha` 0 it is 1.
    """

    target_rank: int = Field(default=8, ge=1)
    initial_rank: int = Field(default=12, ge=1)
    alpha: float = Field(default=32.0, ge=0.0, allow_inf_nan=False)
    tinit: int | None = Field(default=None, ge=0)
    tfinal: int | None = Field(default=None, ge=0)
    delta_t: int = Field(default=1, ge=1)
    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    orth_reg_weight: float = Field(default=0.5, ge=0.0, allow_inf_nan=False)

    @property
    def scaling(self) -> float:
        """What `B diag(E) A` is multiplied by; PEFT keeps the small term that avoids a division by zero."""
        return (self.alpha or float(self.initial_rank)) / (self.initial_rank + 1e-5)
