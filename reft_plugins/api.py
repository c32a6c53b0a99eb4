"""The Python interface: `load`, `train` and `runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.loading import load
from reft_plugins.references import resolve

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter
    from reft_plugins.runtimes import Runtime

__all__ = ["load", "resolve", "runtime", "train"]


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
