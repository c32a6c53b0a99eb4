"""How close two models' next-token predictions are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, computed_field
from torch import Tensor

from reft_plugins.errors import ReftError
from reft_plugins.fidelity.records import Number, Record, rounded

Logits = npt.NDArray[np.float32] | Tensor

TARGET_TOP1, TARGET_KL, TARGET_REMOVED = 0.97, 0.01, 0.95
"""What an approximated export should reach on held-out text."""

EXACT_DIFFERENCE = 1e-4
"""Largest difference of logits of an exact export in float32."""

BLOCK = 8_000_000
"""Logits turned into float64 at once; 64 MB."""

_BUCKETS = 32


class Bucket(Record):
    """Predictions made at tokens `first` to `last` (from 0) of a text; numbers as in `Fidelity`."""

    first: int
    last: int
    tokens: int
    mean_kl: Number
    top1_agreement: Number
    base_mean_kl: Number | None = None


class Fidelity(Record):
    """A model compared with the adapter itself, over all tokens measured.

    Attributes:
        tokens: predictions compared.
        max_logit_difference: largest absolute difference of a logit.
        mean_kl: mean of KL(adapter ‖ export), nats per token.
        top1_agreement: share of tokens where both put the same token first.
        base_mean_kl, base_top1_agreement: the same for the base model without the adapter, None if not measured.
        positions: the same by where in the text, in buckets that double: 0, 1, 2-3, 4-7, …; empty ones are left out.
    """

    model_config = ConfigDict(extra="ignore")

    tokens: int
    max_logit_difference: Number
    mean_kl: Number
    top1_agreement: Number
    base_mean_kl: Number | None = None
    base_top1_agreement: Number | None = None
    positions: tuple[Bucket, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kl_removed(self) -> Number | None:
        """Share of the divergence between base and adapter that the export removes; None where there was none."""
        if self.base_mean_kl is None or self.base_mean_kl < 1e-9:
            return None
        return 1.0 - rounded(self.mean_kl) / rounded(self.base_mean_kl)

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
        """All numbers by name, as they are written."""
        return self.model_dump(mode="json")


class Accumulator:
    """Adds up comparisons of logits, in float64, over any number of texts."""

    def __init__(self) -> None:
        self._largest = 0.0
        self._export, self._base = (torch.zeros(3, _BUCKETS, dtype=torch.float64) for _ in range(2))

    @property
    def tokens(self) -> int:
        """Predictions of an export compared so far."""
        return int(self._export[0].sum())

    def add(self, reference: Logits, export: Logits | None, base: Logits | None = None, first: int = 0) -> None:
        """Add tokens: logits `[tokens, vocabulary]` of the adapter, of the export and of the base model.

        Args:
            first: where in its text the first of these tokens stands.

        Raises:
            ReftError: a logit is not finite, so that nothing can be compared.
        """
        wanted = _checked(reference, "the adapter")
        got = None if export is None else _checked(export, "the exported model")
        plain = None if base is None else _checked(base, "the base model")
        step = max(1, BLOCK // wanted.shape[-1])
        for start in range(0, len(wanted), step):
            rows = slice(start, start + step)
            exact = wanted[rows].double()
            bucket = _buckets(first + start, len(exact))
            if got is not None:
                self._largest = max(self._largest, float((exact - got[rows].double()).abs().max()))
                _count(self._export, bucket, exact, got[rows].double())
            if plain is not None:
                _count(self._base, bucket, exact, plain[rows].double())

    def result(self) -> Fidelity:
        """The averages.

        Raises:
            ReftError: nothing was compared.
        """
        tokens, kl, top1 = self._export.sum(1).tolist()
        base_tokens, base_kl, base_top1 = self._base.sum(1).tolist()
        if not tokens:
            raise ReftError("no held-out text to compare the exported model on; give more text")
        return Fidelity(
            tokens=int(tokens),
            max_logit_difference=self._largest,
            mean_kl=max(0.0, kl / tokens),
            top1_agreement=top1 / tokens,
            base_mean_kl=base_kl / base_tokens if base_tokens else None,
            base_top1_agreement=base_top1 / base_tokens if base_tokens else None,
            positions=tuple(self._bucket(index) for index in range(_BUCKETS) if self._export[0, index]),
        )

    def merge(self, other: Accumulator) -> None:
        """Add everything another one has seen."""
        self._largest = max(self._largest, other._largest)
        self._export, self._base = self._export + other._export, self._base + other._base

    def _bucket(self, index: int) -> Bucket:
        tokens, kl, top1 = self._export[:, index].tolist()
        base_tokens, base_kl, _ = self._base[:, index].tolist()
        return Bucket(
            first=2 ** (index - 1) if index else 0,
            last=2**index - 1,
            tokens=int(tokens),
            mean_kl=max(0.0, kl / tokens),
            top1_agreement=top1 / tokens,
            base_mean_kl=base_kl / base_tokens if base_tokens else None,
        )


def _checked(logits: Logits, whose: str) -> Tensor:
    tensor = torch.as_tensor(logits)
    if not bool(torch.isfinite(tensor).all()):
        raise ReftError(
            f"{whose} computes logits that are not finite, which no measure of fidelity is defined for. "
            "Look for overflowing weights, or use a number format of larger range (bf16, f32)"
        )
    return tensor


def _buckets(first: int, count: int) -> Tensor:
    return torch.tensor([min(place.bit_length(), _BUCKETS - 1) for place in range(first, first + count)])


def _count(sums: Tensor, bucket: Tensor, wanted: Tensor, got: Tensor) -> None:
    """Add number, divergence and agreement of tokens to their buckets."""
    log_wanted = wanted.log_softmax(-1)
    divergence = (log_wanted.exp() * (log_wanted - got.log_softmax(-1))).sum(-1).cpu()
    agreement = (got.argmax(-1) == wanted.argmax(-1)).double().cpu()
    sums.index_add_(1, bucket, torch.stack([torch.ones_like(agreement), divergence, agreement]))
