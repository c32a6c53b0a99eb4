"""Settings of LoRA-Dash."""

from __future__ import annotations

from pydantic import Field

from reft_plugins.methods._weights import TargetConfig


class LoRADashConfig(TargetConfig):
    """LoRA of `rank` and `alpha`; after `dash_after` optimizer steps also along `directions` directions per module.

    The defaults are the paper's for LLaMA-7B, but for `target_modules`, which there were q, k, v, up and down.
    `dropout` zeroes elements of what the learned matrices read while training.
    """

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64.0, allow_inf_nan=False)
    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    directions: int = Field(default=8, ge=1)
    dash_after: int = Field(default=100, ge=1)

    @property
    def scaling(self) -> float:
        """`alpha / rank`, which multiplies `B A`."""
        return self.alpha / self.rank
