"""What methods trained by PEFT share: importing it, and wrapping a base model with its errors made ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reft_plugins.classification.models import head_parameters
from reft_plugins.errors import AdapterError, TrainingError

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "default"
"""Name PEFT gives the only adapter of a wrapped model."""

WRAPPER = "base_model.model."
"""What PEFT's tuners put in front of the base model's module names."""


def require_peft(method: str) -> Any:
    """The module `peft`.

    Raises:
        TrainingError: it cannot be imported; names `method` and what to install.
    """
    try:
        import peft
    except ImportError as error:
        raise TrainingError(
            f"{method} is trained by PEFT, which cannot be imported ({error}). pip install 'reft-plugins[train]'"
        ) from None
    return peft


def wrap(method: str, model: nn.Module, settings: Any) -> Any:
    """`peft.get_peft_model`.

    Args:
        method: named in errors; settings: a `PeftConfig`. Of a model that generates nothing, such as a classifier, the
            head is left out.

    Raises:
        AdapterError: PEFT refuses the settings or the base model.
    """
    peft = require_peft(method)
    if not hasattr(model, "prepare_inputs_for_generation"):
        if settings.is_prompt_learning:
            raise AdapterError(
                f"{method} puts learned positions in front of a prompt; {type(model).__name__} takes none"
            )
        settings.task_type = None
        if hasattr(settings, "exclude_modules") and not settings.exclude_modules:
            settings.exclude_modules = sorted({name.rpartition(".")[0] for name in head_parameters(model)})
    try:
        return peft.get_peft_model(model, settings)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise AdapterError(f"PEFT cannot put {method} on {type(model).__name__}: {error}") from error
