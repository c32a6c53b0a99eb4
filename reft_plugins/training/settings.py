"""Settings of the training loop, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reft_plugins.errors import TrainingError
from reft_plugins.training.quantization import Quantization


class TrainingSettings(BaseModel):
    """See `reft_plugins.training.train` for what each one means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    epochs: float = Field(default=3.0, gt=0)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    seed: int = Field(default=0, ge=0, lt=2**32)
    max_length: int | None = Field(default=None, ge=2)
    group_by_length: bool = True
    padding_side: Literal["left", "right"] = "left"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Quantization | None = None
    device: Literal["cpu", "cuda"] | None = None
    checkpoint_every: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=10, ge=1)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> TrainingSettings:
        """Check settings.

        Raises:
            TrainingError: naming the first one that is wrong.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            setting = ".".join(map(str, first["loc"]))
            raise TrainingError(f"training setting {setting!r}: {first['msg']}, not {first['input']!r}") from None
