"""How wide the components of a model are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from reft_plugins import plugins
from reft_plugins.program import Site


def measure(model: nn.Module, sites: Sequence[Site]) -> dict[Site, int]:
    """The widths of sites, from a forward pass of one token.

    Raises:
        UnsupportedProgramError: the model has no such component.
    """
    if not sites:
        return {}
    executor: Any = plugins.runtimes.get("transformers").executor(model)  # type: ignore[attr-defined]
    device = next(model.parameters()).device
    with torch.no_grad(), executor.capture(list(dict.fromkeys(sites))) as captured:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    return {site: hidden.shape[-1] for site, hidden in captured.items()}
