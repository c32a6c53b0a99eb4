"""A run that is cut off and resumed ends with the parameters of one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import reft_plugins as reft
from reft_plugins.errors import TrainingError
from reft_plugins.training.checkpoints import PARAMETERS_FILE
from reft_plugins.training.trainer import AdapterTrainer

RUN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "gradient_accumulation": 2,
    "warmup_ratio": 0.2,
    "weight_decay": 0.01,
    "dropout": 0.1,
    "progress": False,
}
METHODS: list[dict[str, Any]] = [
    {"method": "loreft", "positions": "f1+l1", "learning_rate": 1e-2},
    {"method": "lora", "rank": 4, "learning_rate": 1e-2},
]


class Cut(Exception):
    """The power goes out."""


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make training die in the forward pass after some optimizer steps."""
    original = AdapterTrainer.training_step

    def arm(steps: int | None) -> None:
        def training_step(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            if steps is not None and self.state.global_step >= steps:
                raise Cut
            return original(self, *args, **kwargs)

        monkeypatch.setattr(AdapterTrainer, "training_step", training_step)

    return arm


def interrupted(cut_after: Any, steps: int, base: Path, task: Path, out: Path, **settings: Any) -> None:
    cut_after(steps)
    with pytest.raises(Cut):
        reft.train(base, data=task, out=out, **settings)
    cut_after(None)


@pytest.mark.parametrize("method", METHODS, ids=["loreft", "lora"])
@pytest.mark.parametrize("steps", [5, 14], ids=["first epoch", "second epoch"])
def test_resumed_is_exactly_uninterrupted(
    tiny_llama: Path, task: Path, held_out: Path, tmp_path: Path, cut_after: Any, method: dict[str, Any], steps: int
) -> None:
    settings = {**RUN, **method, "evaluation": held_out}
    whole = reft.train(tiny_llama, data=task, **settings)
    out = tmp_path / "out"
    interrupted(cut_after, steps, tiny_llama, task, out, checkpoint_every=4, **settings)
    assert not (out / "adapter.json").exists()
    resumed = reft.train(tiny_llama, data=task, out=out, checkpoint_every=4, resume=True, **settings)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name
    assert resumed.manifest.training and whole.manifest.training
    assert resumed.manifest.training.steps == whole.manifest.training.steps == 20
    assert resumed.manifest.training.metrics["eval_loss"] == whole.manifest.training.metrics["eval_loss"]
    assert not (out / "checkpoints").exists() and (out / "adapter.json").exists()


def test_without_the_checkpoint_the_result_would_differ(
    tiny_llama: Path, task: Path, tmp_path: Path, cut_after: Any
) -> None:
    """The control of the test above: a resumed run with a forgotten optimizer state is not the same."""
    settings = {**RUN, **METHODS[0]}
    whole = reft.train(tiny_llama, data=task, **settings)
    out = tmp_path / "out"
    interrupted(cut_after, 13, tiny_llama, task, out, checkpoint_every=4, **settings)
    (out / "checkpoints" / "checkpoint-12" / "optimizer.pt").unlink()
    resumed = reft.train(tiny_llama, data=task, out=out, checkpoint_every=4, resume=True, **settings)
    assert any(not torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())


def test_checkpoints_hold_only_what_is_learned(tiny_llama: Path, task: Path, tmp_path: Path, cut_after: Any) -> None:
    out = tmp_path / "out"
    interrupted(cut_after, 9, tiny_llama, task, out, checkpoint_every=4, **RUN, **METHODS[1])
    checkpoint = out / "checkpoints" / "checkpoint-8"
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"complete", PARAMETERS_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    learned = 4 * 4 * 2 * (128 * 9 + 64 * 2 + 352 * 3) // 2
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert sizes[PARAMETERS_FILE] < 1.2 * 4 * learned and sizes["optimizer.pt"] < 2.5 * 4 * learned
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)


def test_a_half_written_checkpoint_is_passed_over(tiny_llama: Path, task: Path, tmp_path: Path, cut_after: Any) -> None:
    settings = {**RUN, **METHODS[0]}
    whole = reft.train(tiny_llama, data=task, **settings)
    out = tmp_path / "out"
    interrupted(cut_after, 9, tiny_llama, task, out, checkpoint_every=4, **settings)
    newest = out / "checkpoints" / "checkpoint-8"
    (newest / "complete").unlink()
    (newest / PARAMETERS_FILE).write_bytes(b"half")
    resumed = reft.train(tiny_llama, data=task, out=out, checkpoint_every=4, resume=True, **settings)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name


def test_another_run_is_not_resumed_by_mistake(tiny_llama: Path, task: Path, tmp_path: Path, cut_after: Any) -> None:
    out = tmp_path / "out"
    settings = {**RUN, **METHODS[0], "checkpoint_every": 4}
    with pytest.raises(TrainingError, match="no whole checkpoint to resume from"):
        reft.train(tiny_llama, data=task, out=out, resume=True, **settings)
    interrupted(cut_after, 5, tiny_llama, task, out, **settings)
    with pytest.raises(TrainingError, match="interrupted run left checkpoint-4; continue it with resume=True"):
        reft.train(tiny_llama, data=task, out=out, **settings)
    with pytest.raises(TrainingError, match="of another run: settings was .*0.01.*0.5"):
        reft.train(tiny_llama, data=task, out=out, resume=True, **{**settings, "learning_rate": 0.5})
    other = tmp_path / "other.jsonl"
    shutil.copy(task, other)
    with other.open("a") as file:
        file.write(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(TrainingError, match="of another run: data was"):
        reft.train(tiny_llama, data=other, out=out, resume=True, **settings)


def test_a_checkpoint_with_code_does_not_run(tiny_llama: Path, task: Path, tmp_path: Path, cut_after: Any) -> None:
    out, proof = tmp_path / "out", tmp_path / "proof"
    settings = {**RUN, **METHODS[0], "checkpoint_every": 4}
    interrupted(cut_after, 5, tiny_llama, task, out, **settings)

    class CreatesFile:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(proof), "w")

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copytree(out, tmp_path / name)
        torch.save(CreatesFile(), tmp_path / name / "checkpoints" / "checkpoint-4" / name)
        with pytest.raises(TrainingError, match="cannot be resumed"):
            reft.train(tiny_llama, data=task, out=tmp_path / name, resume=True, **settings)
    assert not proof.exists()
