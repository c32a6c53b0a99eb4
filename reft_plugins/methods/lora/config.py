"""Settings of LoRA."""

from __future__ import annotations

from pydantic import Field

from reft_plugins.methods import MethodConfig


class LoRAConfig(MethodConfig):
    """`rank` and `alpha` on `target_modules` (PEFT's names; `all-linear` for every linear module but the head).

    `alpha_pattern` overrides `alpha` for modules whose name is a key or ends with it after a dot, longest key first;
    `use_rslora` scales by `alpha / sqrt(rank)` (arXiv:2312.03732) instead of `alpha / rank`.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    alpha_pattern: dict[str, float] = {}
