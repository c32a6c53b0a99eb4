"""Opening a base model for training: its libraries, tokenizer and context, and a method on its frozen weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.base_model import attention_implementation, read_config
from reft_plugins.errors import TrainingError
from reft_plugins.training.objectives import Objective
from reft_plugins.training.quantization import loading_arguments
from reft_plugins.training.settings import TrainingSettings

if TYPE_CHECKING:
    from reft_plugins.methods import Trainable


def require_libraries() -> None:
    """Import what training needs.

    Raises:
        TrainingError: naming what is missing, and what to install.
    """
    for library in ("torch", "transformers", "accelerate"):
        try:
            import_module(library)
        except ImportError as error:
            raise TrainingError(
                f"training needs {library}, which cannot be imported ({error}). pip install 'reft-plugins[train]'"
            ) from None


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a base model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def length_limit(directory: Path, asked: int | None) -> int:
    """The most tokens of one example: what was asked for, else the context of the base model.

    Raises:
        TrainingError: more than the context was asked for.
    """
    config = read_config(directory)
    context = config.get("max_position_embeddings") or config.get("n_positions") or asked or 2**31
    if asked is not None and asked > context:
        raise TrainingError(
            f"training setting 'max_length': {asked} exceeds the base model's context of {context} tokens"
        )
    return int(asked or context)


def attach(
    directory: Path,
    objective: Objective,
    fill: int,
    method: Any,
    config: Any,
    identity: Any,
    settings: TrainingSettings,
) -> Trainable:
    """The base model, frozen, with the method on it; both depend on the seed alone."""
    from transformers import set_seed

    set_seed(settings.seed)
    model = objective.open(
        directory,
        fill,
        attn_implementation=attention_implementation(directory),
        **loading_arguments(settings.quantization, settings.dtype, settings.device),
    )
    model.requires_grad_(False)
    return objective.attach(method, model, config, identity)
