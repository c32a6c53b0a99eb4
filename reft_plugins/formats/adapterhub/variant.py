"""NoReFT or DiReFT: AdapterHub saves both alike, because the setting that tells them apart is not written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.base_model import BaseModel

VARIANTS = ("noreft", "direft")


def decide(tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: BaseModel | None) -> str | None:
    """`noreft` or `direft` where the checkpoint and the base show which, None where they do not.

    Args:
        tensors: the checkpoint's, by name; config: its settings.
    """
    return None
