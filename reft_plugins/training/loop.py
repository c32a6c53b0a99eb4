"""`train`: from a base model and a file of examples to an adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import identify, locate
from reft_plugins.errors import DataError, TrainingError
from reft_plugins.manifest import TrainingRecord
from reft_plugins.methods import ClosedForm
from reft_plugins.training import checkpoints
from reft_plugins.training.closed_form import SETTINGS as CLOSED_FORM_SETTINGS
from reft_plugins.training.closed_form import run_closed_form
from reft_plugins.training.data import Examples
from reft_plugins.training.objectives import Objective, prepare
from reft_plugins.training.opening import attach, length_limit, load_tokenizer, require_libraries
from reft_plugins.training.room import check_room
from reft_plugins.training.settings import TrainingSettings

if TYPE_CHECKING:
    from reft_plugins.methods import Trainable


def train(
    base: str | Path,
    method: str = "loreft",
    data: str | Path = "train.jsonl",
    *,
    task: str = "causal_lm",
    out: str | Path | None = None,
    evaluation: str | Path | None = None,
    epochs: float = 3.0,
    learning_rate: float | None = None,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    warmup_ratio: float = 0.0,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    schedule: str = "linear",
    seed: int = 0,
    max_length: int | None = None,
    group_by_length: bool = True,
    padding_side: str = "left",
    dtype: str = "float32",
    quantization: str | None = None,
    device: str | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    log_every: int = 10,
    progress: bool = True,
    **method_settings: Any,
) -> Adapter:
    """Train an adapter. The base model stays frozen; the loss is on completions, or on labels, only.

    Args:
        base: folder or hub id of the base model.
        method: a registered method.
        data: JSONL with `{"prompt": …, "completion": …}` per line. The prompt is tokenized as at inference, the
            completion without special tokens, and the end token is appended.
        task: `causal_lm`, or `sequence_classification` with `{"text": …, "label": …}` per line: the head that
            transformers has for the base's architecture is learned as well, with any method, and stored with it.
        out: folder to save the adapter to; checkpoints live in its `checkpoints/` until training is finished.
        evaluation: JSONL of held-out examples, measured after every epoch.
        epochs: passes over the data; learning_rate: peak of AdamW, by default the method's own.
        batch_size: examples per forward pass; gradient_accumulation: forward passes per optimizer step.
        warmup_ratio: share of the steps, or warmup_steps: number of them, with rising learning rate.
        weight_decay: on the method's matrices; max_grad_norm: gradients are clipped to it, 0 for never.
        schedule: `linear` or `cosine` to zero, `constant`, or `constant_with_warmup`.
        seed: of initialisation, data order and dropout.
        max_length: most tokens of one example, by default the base model's context.
        group_by_length: draw batches of examples of like length, which saves padding; the order stays random.
        padding_side: `left` or `right`; neither changes what is learned. With `left` completions end together, so
            logits of prompts need not be computed.
        dtype: of the base model; learned parameters are float32.
        quantization: `4bit` or `8bit`: hold the base model's linear modules so in memory, by bitsandbytes.
        device: `cpu` or `cuda`, by default a GPU if there is one.
        checkpoint_every: steps between checkpoints; resume: go on from the newest one with the same result.
            With `out`, SIGINT (Ctrl-C) and SIGTERM end training behind a checkpoint as well, at any step.
        log_every: steps between two records of the loss; progress: show a bar on standard error.
        **method_settings: settings of the method, for LoReFT `positions`, `layers`, `rank`, ….

    Rules for the data: an example is never cut. One that is longer than `max_length`, or than the context after the
    virtual tokens or prefix of the method, is an error. So is a prompt or completion that is empty, blank, or of which
    the tokenizer makes no token. Padding and the other rows of a batch change no example's loss.

    Returns:
        the adapter; its manifest records data digest, settings and metrics.

    Raises:
        DataError: the data cannot be used; names file and line.
        TrainingError: wrong settings, a missing library, a loss that is not finite, or checkpoints that do not fit.
        TrainingInterruptedError: stopped by a signal; says how to go on.
        AdapterError: wrong settings of the method; UnknownPluginError: no such method.
        BaseModelError: the base model cannot be read.
    """
    require_libraries()
    method_ = plugins.methods.get(method)
    rate = method_.learning_rate if learning_rate is None else learning_rate
    settings = TrainingSettings.parse(
        {
            "task": task,
            "epochs": epochs,
            "learning_rate": rate,
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "warmup_ratio": warmup_ratio,
            "warmup_steps": warmup_steps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "schedule": schedule,
            "seed": seed,
            "max_length": max_length,
            "group_by_length": group_by_length,
            "padding_side": padding_side,
            "dtype": dtype,
            "quantization": quantization,
            "device": device,
            "checkpoint_every": checkpoint_every,
            "log_every": log_every,
        }
    )
    config = parse_config(method_, method_settings)
    identity = identify(base)
    directory = locate(base)
    tokenizer = load_tokenizer(directory)
    limit = length_limit(directory, settings.max_length)
    objective, examples, held_out = prepare(
        settings.task, method_, config, data, evaluation, tokenizer, limit, directory
    )
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    run = {
        "base": identity.fingerprint,
        "method": method,
        "config": config.model_dump(mode="json"),
        "data": examples.digest,
        "settings": settings.model_dump(exclude={"checkpoint_every"}),
    }
    folder = None if out is None else Path(out)
    checkpoint = checkpoints.prepare(folder, resume, run, settings.checkpoint_every is not None)

    trainable = attach(directory, objective, fill, method_, config, identity, settings)
    draft = Adapter.create(method, config.model_dump(), trainable.tensors(), identity, task=objective.fact)
    closed_form = isinstance(trainable, ClosedForm)
    if not closed_form:
        _check_positions(draft, examples, str(data))
    program, context = draft.lower(), length_limit(directory, None)
    check_room(program, examples, context, str(data))
    if held_out is not None:
        check_room(program, held_out, context, str(evaluation))
    started = time.monotonic()
    collator = objective.collator(method_, config, fill, settings.padding_side == "left")
    if closed_form:
        metrics = run_closed_form(trainable, settings, examples, held_out, collator, progress)
    else:
        metrics = _run(trainable, settings, folder, checkpoint, examples, held_out, collator, objective, progress)
    metrics["seconds"] = time.monotonic() - started
    adapter = Adapter.create(
        method,
        config.model_dump(),
        _finite(trainable.tensors()),
        identity,
        task=objective.fact,
        training=TrainingRecord(
            data_sha256=examples.digest,
            examples=len(examples),
            seed=settings.seed,
            steps=int(metrics.pop("steps")),
            epochs=metrics.pop("epochs"),
            arguments=_arguments_of(settings, held_out, closed_form),
            metrics=metrics,
        ),
    )
    if folder is not None:
        adapter.save(folder)
        checkpoints.remove(folder)
    return adapter


def _check_positions(draft: Adapter, examples: Examples, data: str) -> None:
    """An edit that touches no token of any example would be trained without ever being used."""
    import numpy as np

    prompts = np.array([len(row.prompt) for row in examples.rows])
    totals = np.array([len(row) for row in examples.rows])
    for positions in draft.manifest.positions():
        intervals = np.minimum(positions.resolve(prompts), totals[:, None, None])
        if not (intervals[..., 0] < intervals[..., 1]).any():
            raise DataError(
                f"{data}: no token of any example is at positions {str(positions)!r}, so nothing would be learned"
            )


def _run(
    trainable: Trainable,
    settings: TrainingSettings,
    out: Path | None,
    checkpoint: Path | None,
    examples: Examples,
    held_out: Examples | None,
    collator: Any,
    objective: Objective,
    progress: bool,
) -> dict[str, float]:
    import tempfile

    from transformers.trainer_callback import PrinterCallback

    from reft_plugins.training.interruption import Interruption
    from reft_plugins.training.progress import ProgressBar
    from reft_plugins.training.trainer import AdapterTrainer

    bar = ProgressBar() if progress else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if out is None else out / checkpoints.FOLDER
        trainer = AdapterTrainer(trainable, settings, folder, collator, examples, held_out, objective)
        trainer.remove_callback(PrinterCallback)
        interruption = Interruption()
        trainer.add_callback(interruption)
        if bar is not None:
            trainer.add_callback(bar)
        try:
            with nullcontext() if out is None else interruption.listening():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            if bar is not None:
                bar.stop()
        interruption.check(folder)
    return _metrics(trainer.state, trainable, examples, objective)


def _metrics(state: Any, trainable: Trainable, examples: Examples, objective: Objective) -> dict[str, float]:
    """The last value of every measure in the Trainer's history, under the names the manifest keeps."""
    latest: dict[str, float] = {}
    for entry in state.log_history:
        latest.update(entry)
    names = {"loss": "train_loss"} | {f"eval_{name}": f"eval_{name}" for name in objective.metrics}
    epochs = float(state.epoch or 0.0)
    return {
        **{ours: latest[theirs] for theirs, ours in names.items() if math.isfinite(latest.get(theirs, math.nan))},
        "steps": state.global_step,
        "epochs": epochs,
        "tokens": round(epochs * examples.tokens),
        "trainable_parameters": sum(p.numel() for p in trainable.parameters.parameters() if p.requires_grad),
    }


def _finite(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise TrainingError(f"the last step made {name} not finite; lower the learning rate")
    return tensors


def _arguments_of(settings: TrainingSettings, held_out: Examples | None, closed_form: bool) -> dict[str, Any]:
    used = set(CLOSED_FORM_SETTINGS) if closed_form else None
    arguments = settings.model_dump(exclude_none=True, include=used, exclude={"seed"})
    return arguments if held_out is None else {**arguments, "evaluation_sha256": held_out.digest}
