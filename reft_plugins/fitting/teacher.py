"""The adapter's predictions on calibration texts, kept on disk, so that the model may be changed afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reft_plugins.fidelity.reference import Reference, answers_only
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.splitting import training, validating

MAX_BYTES = 4 * 2**30
"""On disk; texts that do not fit are left out, from all sources alike."""


class Teacher:
    """Logits of the adapter in float16, `[tokens, vocabulary]` per text, in a temporary file.

    Where the program works at some positions only, predictions after the prompt count, else all.

    Args:
        reference: with the base model as it is.
        texts: to train on; a fifth is set aside for validation.

    Attributes:
        training, validation: the texts of which there are predictions.
    """

    def __init__(self, reference: Reference, texts: Sequence[Text], max_bytes: int = MAX_BYTES) -> None:
        self._answers_only = answers_only(reference.program)
        self._vocabulary = reference.vocabulary
        chosen = self._fitting(texts, max_bytes)
        self.training, self.validation = training(chosen), validating(chosen)
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._offsets: dict[int, int] = {}
        self._texts = chosen
        for rows, batch in reference.batches(chosen):
            with reference.running(batch, reference.program):
                logits = reference.forward(batch)
            for row, text in enumerate(rows):
                self._offsets[id(text)] = self._file.tell()
                own = logits[row, self.first(text) : len(text.tokens)]
                below = (own - own.amax(-1, keepdim=True)).clamp_min(torch.finfo(torch.float16).min)
                self._file.write(below.half().cpu().numpy().tobytes())

    def first(self, text: Text) -> int:
        """The first token of a text whose prediction counts."""
        return text.prompt_length - 1 if self._answers_only else 0

    def count(self, text: Text) -> int:
        """How many predictions of a text count."""
        return len(text.tokens) - self.first(text)

    def log_probabilities(self, text: Text) -> Tensor:
        """Float32 `[count, vocabulary]`."""
        self._file.seek(self._offsets[id(text)])
        data = self._file.read(2 * self.count(text) * self._vocabulary)
        values = np.frombuffer(data, dtype=np.float16).reshape(-1, self._vocabulary)
        return torch.from_numpy(values.astype(np.float32)).log_softmax(-1)

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()

    def _fitting(self, texts: Sequence[Text], max_bytes: int) -> list[Text]:
        """As many texts as there is room for, evenly from the whole sequence."""
        usable = [text for text in texts if self.count(text) > 0]
        needed = 2 * self._vocabulary * sum(map(self.count, usable))
        share = min(1.0, max_bytes / max(1, needed))
        return [text for index, text in enumerate(usable) if int((index + 1) * share) > int(index * share)]
