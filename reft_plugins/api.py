"""The Python interface: `load`, `train` and `runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import check_base, identify
from reft_plugins.formats import recognise
from reft_plugins.references import resolve
from reft_plugins.runtimes import mismatch_allowed

if TYPE_CHECKING:
    from reft_plugins.runtimes import Runtime

__all__ = ["load", "resolve", "runtime", "train"]


def load(
    source: Adapter | str | Path,
    base: str | Path | None = None,
    positions: str | None = None,
    **options: Any,
) -> Adapter:
    """Load an adapter from a path, a store reference, or a checkpoint of any registered format.

    Args:
        source: directory, reference, or an Adapter, which is returned as it is.
        base: base model (folder or hub id); an adapter made for another one is refused. Foreign checkpoints do not
            name their base reliably: without it the result runs nowhere until it gets one.
        positions: for foreign checkpoints that do not store them, for example `f7+l7`.
        **options: what else the file does not say, for example `activation="relu"`.

    Raises:
        UnknownReferenceError, AdapterError, BaseMismatchError, PositionsError.
    """
    if isinstance(source, Adapter):
        adapter = source
    else:
        directory = resolve(source)
        reader = recognise(directory)
        identity = identify(base) if base is not None else None
        adapter = reader.read(directory, base=identity, positions=positions, **options)
    if base is not None:
        check_base(adapter.manifest, identify(base), mismatch_allowed())
    return adapter


def runtime(name: str, base: str | Path, **options: Any) -> Runtime:
    """Start a runtime on a base model.

    Args:
        name: `transformers` (the reference), `vllm`, or any that a plugin registers.
        base: folder or hub id.
        **options: of that runtime; `dtype="float32"` works for all.

    Raises:
        UnknownPluginError: listing the runtimes that are installed.
    """
    started: Runtime = plugins.runtimes.get(name)(base, **options)
    return started


def train(base: str | Path, method: str = "loreft", data: str | Path = "train.jsonl", **settings: Any) -> Adapter:
    """Train an adapter; see `reft_plugins.training.train` for all settings.

    Args:
        base: folder or hub id of the base model.
        method: a registered method.
        data: JSONL with `{"prompt": …, "completion": …}` per line.
        **settings: settings of the method (`positions`, `rank`, `layers`, …) and of the training loop
            (`epochs`, `learning_rate`, `batch_size`, `seed`, …).
    """
    from reft_plugins.training import train as run

    return run(base, method=method, data=data, **settings)
