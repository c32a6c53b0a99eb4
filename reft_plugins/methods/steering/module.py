"""What a steering vector's unit holds, and how it is computed from contrast pairs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins import plugins
from reft_plugins.methods.interventions.module import InterventionParameters, UnitParameters
from reft_plugins.positions import Positions
from reft_plugins.program import Site


class SteeringVector(UnitParameters):
    """One vector; zero to begin with, which is the base model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))

    def tensors(self) -> dict[str, Tensor]:
        """`vector` `[width]`."""
        return {"vector": self.vector}


class DifferenceOfMeans:
    """Sets steering vectors to the mean difference of activations; see `methods.Trainable` and `methods.ClosedForm`."""

    def __init__(self, model: nn.Module, parameters: InterventionParameters, read_positions: Positions) -> None:
        self.model, self.parameters = model, parameters
        self._read = read_positions
        self._executor: Any = plugins.runtimes.get("transformers").executor(model)  # type: ignore[attr-defined]
        taken = inspect.signature(model.forward).parameters
        self._frugal = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in taken}
        self._sites = list(dict.fromkeys(unit.site for unit in parameters.units))

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """Nothing depends on the prompts of a batch."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store."""
        return self.parameters.tensors()

    def fit(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Set every unit's vector to the mean of its site's differences.

        Returns:
            `vector_norm`, the mean length of the vectors, and `agreement`, the length of a mean difference relative to
            the mean length of its differences: 1 where all pairs differ the same way, near 0 where they disagree.
        """
        sums: dict[Site, Tensor] = {}
        lengths: dict[Site, Tensor] = {}
        pairs = 0
        for differences in map(self._differences, batches):
            for site, rows in differences.items():
                sums[site] = sums.get(site, 0) + rows.sum(0)
                lengths[site] = lengths.get(site, 0) + rows.norm(dim=-1).sum()
            pairs += len(next(iter(differences.values())))
        for unit, part in zip(self.parameters.units, self.parameters.parts, strict=True):
            assert isinstance(part, SteeringVector)
            part.vector.copy_(sums[unit.site] / pairs)
        norms = {site: sums[site].norm() / pairs for site in self._sites}
        agreement = [(norms[site] * pairs / lengths[site].clamp(min=1e-30)).item() for site in self._sites]
        return {
            "vector_norm": sum(norm.item() for norm in norms.values()) / len(norms),
            "agreement": sum(agreement) / len(agreement),
        }

    def evaluate(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """`separated`: share of held-out pairs whose positive text is further along the vector, averaged over sites."""
        stored = self.tensors()
        vectors = {unit.site: stored[f"{unit}.vector"].double() for unit in self.parameters.units}
        right = [
            (rows @ vectors[site].to(rows.device) > 0).double().tolist()
            for differences in map(self._differences, batches)
            for site, rows in differences.items()
        ]
        flat = [value for values in right for value in values]
        return {"separated": sum(flat) / len(flat)}

    def _differences(self, batch: dict[str, Tensor]) -> dict[Site, Tensor]:
        """Positive minus negative, float64 `[pairs, width]` per site, each text averaged over the tokens read."""
        indices = batch["position_ids"].masked_fill(batch["attention_mask"] == 0, -1).cpu()
        mask = self._read.mask(indices.numpy(), batch["attention_mask"].sum(-1, keepdim=True).cpu().numpy())
        weights = torch.from_numpy(mask).to(batch["input_ids"].device, torch.float64)
        weights = weights / weights.sum(-1, keepdim=True)
        with self._executor.capture(self._sites) as captured:
            self.model(**batch, **self._frugal)
        return {site: _halves(weights, captured[site]) for site in self._sites}


def _halves(weights: Tensor, states: Tensor) -> Tensor:
    positive, negative = torch.einsum("rt,rth->rh", weights, states.double()).chunk(2)
    return positive - negative
