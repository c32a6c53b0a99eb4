"""Long work can be stopped and goes on without loss; data that cannot be used says why; padding teaches nothing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

import reft_plugins as reft
from reft_plugins.errors import DataError, TrainingInterruptedError
from reft_plugins.program import KeyValuePrefix, Program, VirtualTokens
from reft_plugins.training.data import read_examples
from reft_plugins.training.interruption import Interruption
from reft_plugins.training.progress import ProgressBar
from reft_plugins.training.room import check_room, positions_in_front
from reft_plugins.training.trainer import AdapterTrainer

RUN: dict[str, Any] = {"epochs": 2, "batch_size": 24, "gradient_accumulation": 2, "weight_decay": 0.01}
STEPS = 8
"""160 examples make 7 batches, so the last step of an epoch accumulates one batch and the others two."""
BY_PROGRAM = {"method": "loreft", "positions": "f1+l1", "learning_rate": 1e-2, "dropout": 0.1}
BY_PEFT = {"method": "lora", "rank": 4, "learning_rate": 1e-2, "dropout": 0.1}
BY_PEFT_IN_FRONT = {"method": "p_tuning", "num_virtual_tokens": 3, "encoder": "lstm", "encoder_dropout": 0.2}


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the process receive a signal in the second forward pass of an optimizer step."""
    original = AdapterTrainer.training_step

    def arm(number: signal.Signals, step: int) -> None:
        passes = {"done": 0}

        def training_step(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            passes["done"] += self.state.global_step == step
            if passes["done"] == 2:
                passes["done"] = -1000
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(AdapterTrainer, "training_step", training_step)

    return arm


@pytest.mark.parametrize(
    ("method", "number", "step"),
    [
        (BY_PROGRAM, signal.SIGINT, 1),
        (BY_PEFT, signal.SIGTERM, 5),
        (BY_PEFT_IN_FRONT, signal.SIGINT, 4),
    ],
    ids=["program", "peft", "in front"],
)
def test_a_signal_ends_behind_a_checkpoint_and_nothing_is_lost(
    tiny_llama: Path,
    task: Path,
    held_out: Path,
    tmp_path: Path,
    signal_at: Any,
    capfd: pytest.CaptureFixture[str],
    method: dict[str, Any],
    number: signal.Signals,
    step: int,
) -> None:
    settings = {**RUN, **method, "evaluation": held_out, "progress": False}
    whole = reft.train(tiny_llama, data=task, **settings)
    before = signal.getsignal(number)
    signal_at(number, step)
    out = tmp_path / "out"
    with pytest.raises(TrainingInterruptedError, match=rf"{number.name} after step {step + 1} of {STEPS}.*--resume"):
        reft.train(tiny_llama, data=task, out=out, **settings)
    assert signal.getsignal(number) is before
    assert "Once more to stop at once" in capfd.readouterr().err
    assert [path.name for path in (out / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{step + 1}"]
    assert not (out / "adapter.json").exists()
    resumed = reft.train(tiny_llama, data=task, out=out, resume=True, **settings)
    assert resumed.manifest.training and resumed.manifest.training.steps == STEPS
    assert whole.manifest.training
    assert resumed.manifest.training.metrics["eval_loss"] == whole.manifest.training.metrics["eval_loss"]
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name
    untrained = reft.train(tiny_llama, data=task, **{**settings, "epochs": 0.01, "learning_rate": 1e-12})
    assert any(not torch.allclose(tensor, untrained.tensors[name]) for name, tensor in whole.tensors.items())


def test_a_signal_in_the_last_step_ends_as_planned(
    tiny_llama: Path, task: Path, tmp_path: Path, signal_at: Any
) -> None:
    signal_at(signal.SIGINT, 2)
    short = {**RUN, **BY_PROGRAM, "epochs": 0.75, "progress": False}
    adapter = reft.train(tiny_llama, data=task, out=tmp_path / "out", **short)
    assert adapter.manifest.training and adapter.manifest.training.steps == 3
    assert (tmp_path / "out" / "adapter.json").exists()


def test_the_command_line_stops_without_a_traceback_and_says_how_to_go_on(
    tiny_llama: Path, task: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from reft_plugins.cli import main; main()", "train", str(tiny_llama)]
    command += ["--method", "loreft", "--positions", "f1+l1", "--data", str(task), "--out", str(out), "--epochs", "400"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "step 10 of 8000" in line:
                process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    shown = "".join(lines)
    assert code == 1 and "Traceback" not in shown
    assert "reft: stopped by SIGTERM after step" in shown and "--resume" in shown
    assert "steps/s: loss " in shown, "where there is no terminal, lines show rate and loss"
    [checkpoint] = (out / "checkpoints").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert 10 <= state["global_step"] < 8000 and (checkpoint / "complete").exists()


def test_a_second_signal_acts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interruption().listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_training_leaves_signals_alone() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Interruption().listening():
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


def test_the_bar_shows_steps_rate_remaining_time_and_loss() -> None:
    bar, state, clock = ProgressBar(), SimpleNamespace(global_step=4, max_steps=1000), [0.0]
    bar._bar.get_time = lambda: clock[0]
    console = Console(width=200, file=io.StringIO())
    bar.on_train_begin(None, state, None)
    for state.global_step in range(4, 9):
        bar.on_step_end(None, state, None)
        clock[0] += 0.5
    bar.on_log(None, state, None, logs={"loss": 1.25, "grad_norm": 7.0})
    console.print(bar._bar.get_renderable())
    bar.on_prediction_step(None, state, None)
    console.print(bar._bar.get_renderable())
    bar.stop()
    training, evaluating = console.file.getvalue().splitlines()
    assert training.startswith("training") and training.rstrip().endswith("loss 1.2500")
    assert "8/1000 2.0 steps/s 0:00:02 0:08:16" in training, "992 steps remain"
    assert evaluating.startswith("evaluating")


@pytest.mark.parametrize("method", [BY_PROGRAM, BY_PEFT_IN_FRONT], ids=["program", "in front"])
def test_empty_data_is_named(tiny_llama: Path, task: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    for files in ({"data": empty}, {"data": task, "evaluation": empty}):
        with pytest.raises(DataError, match=r"empty\.jsonl: no examples"):
            reft.train(tiny_llama, progress=False, **files, **method)


def test_texts_of_which_no_token_is_made_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    """Tokenizers drop characters: what is left of a text may be nothing, though it is not blank."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u2060", "")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    path = tmp_path / "data.jsonl"
    for field in ("prompt", "completion"):
        row = {"prompt": "the dog", "completion": " sees", field: "\u2060\u2060"}
        path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps(row))
        with pytest.raises(
            DataError, match=rf"data\.jsonl, line 2: the base model's tokenizer .*no token of the {field}"
        ):
            read_examples(path, tokenizer, 100)


def test_what_stands_in_front_counts_against_the_context() -> None:
    pairs = torch.zeros(7, 2, 4)
    tokens = Program((VirtualTokens(torch.zeros(5, 8)),))
    prefix = Program((KeyValuePrefix(0, pairs, pairs), KeyValuePrefix(1, pairs, pairs)))
    gated = Program((KeyValuePrefix(0, pairs, pairs, gate=torch.zeros(1)),))
    both = Program((*tokens, *prefix))
    assert [positions_in_front(program) for program in (tokens, prefix, gated, both)] == [5, 7, 0, 12]
    rows = ["x" * 20, "x" * 30, "x" * 25]
    check_room(both, rows, 42, "data.jsonl")
    with pytest.raises(DataError, match=r"data\.jsonl: example 2 has 30 tokens; with the 12 positions.*context of 41"):
        check_room(both, rows, 41, "data.jsonl")
    check_room(gated, rows, 30, "data.jsonl")


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_that_leave_no_room_are_refused_before_training(
    tiny_llama: Path, task: Path, method: str
) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: example \d+ has \d+ tokens; with the 505 positions .* of 512"):
        reft.train(tiny_llama, method, task, num_virtual_tokens=505, progress=False)
