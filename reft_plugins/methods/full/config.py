"""Settings of full fine-tuning."""

from __future__ import annotations

from pydantic import Field

from reft_plugins.methods import MethodConfig


class FullConfig(MethodConfig):
    """`parameters`: shell patterns (`*`, `?`) of the names of the parameters that are learned; all of them by default.

    For example `["*.bias"]` (BitFit, arXiv:2106.10199), `["*.layers.3.*", "*norm*"]` or `["*embed_tokens*"]`.
    """

    parameters: tuple[str, ...] = Field(default=("*",), min_length=1)
