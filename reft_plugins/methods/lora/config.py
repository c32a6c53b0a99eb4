"""Settings of LoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from reft_plugins.methods._weights import LowRankPeftConfig

Initialisation = (
    Literal[True, "gaussian", "orthogonal", "pissa"]
    | Annotated[str, StringConstraints(pattern=r"^pissa_niter_[1-9][0-9]{0,2}$")]
)


class LoRAConfig(LowRankPeftConfig):
    """`rank` and `alpha` on `target_modules`.

    `rank_pattern` and `alpha_pattern` override both for modules whose name is a key or ends with it after a dot,
    longest key first. `use_rslora` scales by `alpha / sqrt(rank)` (arXiv:2312.03732) instead of `alpha / rank`;
    `use_dora` also learns the norm of every row of the changed weight (arXiv:2402.09353); `lora_bias` learns a bias.
    `init_lora_weights` is PEFT's: by default a change that starts at zero, with `gaussian` or `orthogonal` as another
    start of `A`; `pissa` (arXiv:2404.02948), or `pissa_niter_16` for a fast approximation, starts from the principal
    singular vectors of the base.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, allow_inf_nan=False)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: Initialisation = True
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, float] = {}
