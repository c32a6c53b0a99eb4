"""How close two models' next-token predictions are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Logits = npt.NDArray[np.float32] | torch.Tensor

TARGET_TOP1, TARGET_KL, TARGET_REMOVED = 0.97, 0.01, 0.95
"""What an approximated export should reach on held-out text."""

EXACT_DIFFERENCE = 1e-4
"""Largest difference of logits of an exact export in float32."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A model compared with the adapter itself, over all tokens measured.

    Attributes:
        tokens: predictions compared.
        max_logit_difference: largest absolute difference of a logit.
        mean_kl: mean of KL(adapter ‖ export), nats per token.
        top1_agreement: share of tokens where both put the same token first.
        base_mean_kl, base_top1_agreement: the same for the base model without the adapter, None if not measured.
    """

    tokens: int
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    base_mean_kl: float | None = None
    base_top1_agreement: float | None = None

    @property
    def kl_removed(self) -> float | None:
        """Share of the divergence between base and adapter that the export removes; None where there was none."""
        if self.base_mean_kl is None or self.base_mean_kl < 1e-9:
            return None
        return 1.0 - self.mean_kl / self.base_mean_kl

    @property
    def on_target(self) -> bool:
        """Whether an approximation is as good as it should be."""
        removed = self.kl_removed
        return (
            self.top1_agreement >= TARGET_TOP1
            and self.mean_kl <= TARGET_KL
            and (removed is None or removed >= TARGET_REMOVED)
        )

    def to_json(self) -> dict[str, Any]:
        """All numbers by name."""
        return {**asdict(self), "kl_removed": self.kl_removed}


class Accumulator:
    """Adds up comparisons of logits, in float64, over any number of texts."""

    def __init__(self) -> None:
        self.tokens = 0
        self._largest = 0.0
        self._kl, self._top1 = 0.0, 0
        self._base_kl, self._base_top1, self._base_tokens = 0.0, 0, 0

    def add(self, reference: Logits, export: Logits | None, base: Logits | None = None) -> None:
        """Add tokens: logits `[tokens, vocabulary]` of the adapter, of the export and of the base model."""
        wanted = _double(reference)
        log_wanted = wanted.log_softmax(-1)
        best = wanted.argmax(-1)
        if export is not None:
            got = _double(export)
            self.tokens += len(wanted)
            self._largest = max(self._largest, float((wanted - got).abs().max()))
            self._kl += _kl(log_wanted, got)
            self._top1 += int((got.argmax(-1) == best).sum())
        if base is not None:
            plain = _double(base)
            self._base_tokens += len(wanted)
            self._base_kl += _kl(log_wanted, plain)
            self._base_top1 += int((plain.argmax(-1) == best).sum())

    def result(self) -> Fidelity:
        """The averages; at least one token must have been added."""
        return Fidelity(
            tokens=self.tokens,
            max_logit_difference=self._largest,
            mean_kl=max(0.0, self._kl / self.tokens),
            top1_agreement=self._top1 / self.tokens,
            base_mean_kl=self._base_kl / self._base_tokens if self._base_tokens else None,
            base_top1_agreement=self._base_top1 / self._base_tokens if self._base_tokens else None,
        )

    def merge(self, other: Accumulator) -> None:
        """Add everything another one has seen."""
        self._largest = max(self._largest, other._largest)
        for name in ("tokens", "_kl", "_top1", "_base_kl", "_base_top1", "_base_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def _double(logits: Logits) -> torch.Tensor:
    return torch.as_tensor(logits).double()


def _kl(log_wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float((log_wanted.exp() * (log_wanted - got.log_softmax(-1))).sum())
