"""The Trainer of transformers, taught to run a `Trainable` and to checkpoint only what is learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from reft_plugins.errors import TrainingError
from reft_plugins.methods import Staged, Trainable
from reft_plugins.training.checkpoints import PARAMETERS_FILE, mark_complete, resuming
from reft_plugins.training.data import Examples
from reft_plugins.training.objectives import Objective
from reft_plugins.training.order import LikeLengths
from reft_plugins.training.settings import TrainingSettings


class Step(nn.Module):
    """One forward pass of a `Trainable`: tells it the prompt lengths, then runs it."""

    accepts_loss_kwargs = False
    """The loss is ours (`Objective.loss`), so the Trainer must not hand the base model arguments for its own."""

    def __init__(self, trainable: Trainable) -> None:
        super().__init__()
        self.model, self.learned = trainable.model, trainable.parameters
        self._trainable = trainable
        base = next((module for module in self.model.modules() if isinstance(module, PreTrainedModel)), self.model)
        taken = signature(base.forward).parameters
        self._cuts_logits = "logits_to_keep" in taken
        self._uncached = {"use_cache": False} if "use_cache" in taken else {}

    def forward(self, prompt_lengths: Tensor, logits_to_keep: int | None = None, **batch: Tensor) -> Any:
        """Outputs of the base model under the method being trained.

        They have `logits` `[batch, tokens, vocabulary]`, or of a classifier `[batch, labels]`.

        With `logits_to_keep` only the logits of so many of the last columns are needed, and computed if the model can.
        """
        self._trainable.begin_batch(prompt_lengths)
        if logits_to_keep is not None and self._cuts_logits:
            return self.model(**batch, **self._uncached, logits_to_keep=logits_to_keep)
        return self.model(**batch, **self._uncached)


class Stages(TrainerCallback):
    """Tells a `Staged` trainable where training is."""

    def __init__(self, staged: Staged) -> None:
        self._staged = staged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The steps of the whole run, whether it starts or is resumed."""
        self._staged.begin_training(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer counts the step after its gradients are gone, so it is one ahead here."""
        self._staged.end_step(state.global_step + 1)


class AdapterTrainer(Trainer):
    """Trains `Step(trainable)`; checkpoints hold learned parameters in safetensors and the Trainer's own state."""

    def __init__(
        self,
        trainable: Trainable,
        settings: TrainingSettings,
        folder: Path,
        collator: Callable[[Any], dict[str, Tensor]],
        data: Examples,
        evaluation: Examples | None,
        objective: Objective,
    ) -> None:
        self._objective = objective
        self._learned = trainable.parameters
        self._like_lengths = settings.group_by_length
        super().__init__(
            model=Step(trainable),
            args=_arguments(settings, folder, len(data), evaluation is not None),
            data_collator=collator,
            train_dataset=data,  # type: ignore[arg-type]
            eval_dataset=evaluation,  # type: ignore[arg-type]
            compute_loss_func=objective.loss,
            compute_metrics=self._summarise,
        )
        if isinstance(trainable, Staged):
            self.add_callback(Stages(trainable))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but parametrised tensors: torch's Householder form of a rotation has signs in it that must stay ±1."""
        return [name for name in super().get_decay_parameter_names(model) if ".parametrizations." not in name]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._like_lengths:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(row) for row in self.train_dataset]  # type: ignore[union-attr, arg-type]
        return LikeLengths(lengths, int(self.args.per_device_train_batch_size), int(self.args.seed))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass.

        Raises:
            TrainingError: when the loss is not finite.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(value := loss.item()):
            raise TrainingError(
                f"the loss is {value} after {self.state.global_step} steps. Lower the learning rate "
                f"(now {self.args.learning_rate:g}), or train in float32 if the base runs in float16"
            )
        return loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, Tensor, Tensor]:
        """Statistics of each row instead of its logits, which for a whole data set would not fit in memory."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        with torch.inference_mode():
            statistics = self._objective.statistics(model(**inputs).logits, labels)
        return None, statistics, statistics[:, 1]

    def _summarise(self, prediction: EvalPrediction) -> dict[str, float]:
        return self._objective.summarise(np.asarray(prediction.predictions, dtype=np.float64))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self._learned.state_dict().items()}
        safetensors.torch.save_file(state, folder / PARAMETERS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with resuming(resume_from_checkpoint):
            self._learned.load_state_dict(safetensors.torch.load_file(Path(resume_from_checkpoint) / PARAMETERS_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with resuming(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        mark_complete(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")


def _arguments(settings: TrainingSettings, folder: Path, examples: int, evaluate: bool) -> TrainingArguments:
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        warmup_steps=_warmup_steps(settings, examples),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=settings.schedule,
        seed=settings.seed,
        optim="adamw_torch",
        use_cpu=cpu,
        eval_strategy="epoch" if evaluate else "no",
        save_strategy="steps" if settings.checkpoint_every else "no",
        save_steps=settings.checkpoint_every or 500,
        save_total_limit=2,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=not cpu,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would copy the model without its hooks
    return arguments


def _warmup_steps(settings: TrainingSettings, examples: int) -> int:
    """The number asked for, or the share of all optimizer steps, rounded up."""
    per_epoch = math.ceil(math.ceil(examples / settings.batch_size) / settings.gradient_accumulation)
    return settings.warmup_steps or math.ceil(settings.warmup_ratio * math.ceil(settings.epochs * per_epoch))
