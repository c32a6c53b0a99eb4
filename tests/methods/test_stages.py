"""Methods whose training has stages are resumed in the stage they were in: LoRA-Dash and AdaLoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import reft_plugins as reft
from reft_plugins.training.trainer import AdapterTrainer

Tasks = dict[bool, tuple[Path, Path]]
RUN: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-2, "dropout": 0.1, "progress": False}
METHODS: dict[str, dict[str, Any]] = {
    "lora_dash": {"rank": 4, "dash_after": 7},
    "adalora": {"tinit": 2, "tfinal": 6},
}


class Cut(Exception):
    """The power goes out."""


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Make training die before some optimizer step."""
    original = AdapterTrainer.training_step

    def arm(steps: int | None) -> None:
        def training_step(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            if steps is not None and self.state.global_step >= steps:
                raise Cut
            return original(self, *args, **kwargs)

        monkeypatch.setattr(AdapterTrainer, "training_step", training_step)

    return arm


@pytest.fixture
def interrupted(
    tiny_llama: Path, tasks: Tasks, tmp_path: Path, cut_after: Callable[[int | None], None]
) -> Callable[[str, int], tuple[Any, Path, Callable[[], Any]]]:
    """The uninterrupted adapter, what the checkpoint of an interrupted run knows, and how to resume that run."""

    def interrupt(method: str, steps: int) -> tuple[Any, Path, Callable[[], Any]]:
        data, out, run = tasks[False][0], tmp_path / "out", RUN | METHODS[method]
        whole = reft.train(tiny_llama, method, data, **run)
        cut_after(steps + 1)
        with pytest.raises(Cut):
            reft.train(tiny_llama, method, data, out=out, checkpoint_every=4, **run)
        cut_after(None)
        checkpoint = out / "checkpoints" / f"checkpoint-{steps}" / "learned.safetensors"
        return (
            whole,
            checkpoint,
            lambda: reft.train(tiny_llama, method, data, out=out, checkpoint_every=4, resume=True, **run),
        )

    return interrupt


@pytest.mark.parametrize("steps", [4, 12], ids=["early", "late"])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_exactly_uninterrupted(method: str, steps: int, interrupted: Any) -> None:
    """Before and after the directions are chosen, while ranks are taken away and when they are final."""
    whole, checkpoint, resume = interrupted(method, steps)
    if method == "lora_dash":
        assert bool(safetensors.torch.load_file(checkpoint)["started"]) == (steps > 7)
    resumed = resume()
    assert set(resumed.tensors) == set(whole.tensors)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name


@pytest.mark.parametrize(("method", "state", "steps"), [("lora_dash", "started", 12), ("adalora", "average_", 4)])
def test_without_its_state_the_result_would_differ(method: str, state: str, steps: int, interrupted: Any) -> None:
    """The control of the test above."""
    whole, checkpoint, resume = interrupted(method, steps)
    saved = safetensors.torch.load_file(checkpoint)
    lost = [name for name in saved if name.startswith(state)]
    assert any(saved[name].any() for name in lost)
    saved |= {name: torch.zeros_like(saved[name]) for name in lost}
    safetensors.torch.save_file(saved, checkpoint)
    resumed = resume()
    assert set(resumed.tensors) != set(whole.tensors) or any(
        tensor.shape != resumed.tensors[name].shape or not torch.equal(tensor, resumed.tensors[name])
        for name, tensor in whole.tensors.items()
    )
