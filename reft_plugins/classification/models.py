"""Opening a base model as a classifier of texts: its backbone as stored, its head stored or fresh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.base_model import read_config
from reft_plugins.errors import BaseModelError

if TYPE_CHECKING:
    from torch import nn

_FRESH = "parameters_made_fresh"


def stored_labels(directory: Path) -> tuple[str, ...]:
    """The labels of a base model that is a classifier already, in the order of its outputs; else none."""
    config = read_config(directory)
    architecture = (config.get("architectures") or [""])[0]
    names = config.get("id2label")
    if not architecture.endswith("ForSequenceClassification") or not isinstance(names, dict):
        return ()
    return tuple(str(names[key]) for key in sorted(names, key=int))


def open_classifier(directory: Path, labels: Sequence[str], fill: int | None, **loading: Any) -> nn.Module:
    """Load a base model under transformers' classification head for its architecture.

    What the base does not store, or stores for another number of labels, is drawn from torch's generator.

    Args:
        labels: names of the outputs; fill: token id of padding, for models that find the last token by it.
        **loading: of `from_pretrained`.

    Raises:
        BaseModelError: transformers has no classification head for this architecture.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(directory, num_labels=len(labels))
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    text_config = config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = fill
    try:
        with _quiet():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                directory, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **loading
            )
    except ValueError as error:
        raise BaseModelError(f"{directory}: cannot be opened as a classifier of texts: {error}") from None
    fresh = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    setattr(model, _FRESH, frozenset(fresh))
    found: nn.Module = model
    return found


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's head by name: all outside its backbone, and of it those the base does not store.

    Of a causal language model, that is the output projection.
    """
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        modules = {name for name, module in model.named_modules() if module is output}
        every = model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in every if name.rpartition(".")[0] in modules}
    backbone = f"{model.base_model_prefix}."
    fresh: frozenset[str] = getattr(model, _FRESH, frozenset())
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if name in fresh or not name.startswith(backbone)}


def output_module(model: nn.Module) -> str:
    """Name of the module that gives one number per label.

    Raises:
        BaseModelError: none of the head's has as many outputs as there are labels.
    """
    labels = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    for name, parameter in reversed(head_parameters(model).items()):
        if name.endswith(".weight") and parameter.shape[0] == labels:
            return name.rpartition(".")[0]
    raise BaseModelError(f"{type(model).__name__}: no module of its head has an output for each of {labels} labels")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of parameters that are not in the file, which are expected here."""
    import logging as levels

    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
