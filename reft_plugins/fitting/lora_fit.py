"""The steps from a plan to the updates of a LoRA: factors, constants, a regression, a distillation, a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reft_plugins.fidelity.evaluation import Evaluation, Evaluator
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Texts
from reft_plugins.fitting.approximation import Approximation, Progress, approximate, refine
from reft_plugins.fitting.constants import fit_constants
from reft_plugins.fitting.distillation import Schedule
from reft_plugins.fitting.lora_plan import EXACT, Held, LoraPlan
from reft_plugins.fitting.running import Student, applied
from reft_plugins.fitting.truncation import stack, truncate
from reft_plugins.fitting.updates import LowRank
from reft_plugins.program import WeightDelta

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter


@dataclass(slots=True)
class LoraFit:
    """The updates of a plan, in the making.

    Attributes:
        updates, lost, strategy, details, warnings: see `reft_plugins.fitting.as_lora.LoraConversion`.
    """

    plan: LoraPlan
    held: dict[str, Held]
    rank: float
    schedule: Schedule
    progress: Progress
    updates: dict[str, LowRank] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    strategy: str = "factors"
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def needs_text(self, distill: bool) -> bool:
        """Whether anything is fitted."""
        biased = any(held.bias is not None for held in self.held.values())
        cut = any(held.lost > EXACT for held in self.held.values())
        return bool(self.plan.fitted or self.plan.taught) or biased or (distill and cut)

    def run(self, reference: Reference, runtime: Any, adapter: Adapter, texts: Texts, distill: bool) -> Evaluation:
        """Fit what has to be, and measure it; the model of `reference` is the base and stays as it is."""
        self.progress("Running the adapter on held-out text", 0, 0)
        with closing(Evaluator(reference, runtime, adapter, texts.held_out)) as evaluator:
            found = self._regress(reference, texts)
            if distill and (self.plan.taught or not self._good(reference, evaluator)):
                self._distill(reference, found, texts)
            self.progress("Measuring the LoRA on held-out text", 0, 0)
            return self._measured(reference, evaluator.installed)

    def _good(self, reference: Reference, evaluator: Evaluator) -> bool:
        nothing_cut = all(share <= EXACT for share in self.lost.values())
        if self.strategy == "factors" and nothing_cut and not self.plan.widened:
            return True
        self.progress("Measuring the LoRA on held-out text", 0, 0)
        return self._measured(reference, evaluator.predictions).on_target

    def _measured(self, reference: Reference, measure: Callable[[], Evaluation]) -> Evaluation:
        with applied(reference.model, self.updates):
            return measure()

    def _regress(self, reference: Reference, texts: Texts) -> Approximation:
        """Factors of weight changes, then what constants, edits and prefixes come to beside them."""
        parts = {module: [held.update] for module, held in self.held.items()}
        self.lost = {module: held.lost for module, held in self.held.items()}
        biases = {module: held.bias for module, held in self.held.items() if held.bias is not None}
        if biases:
            self.strategy = "fitted"
            adapted = Student.of(reference, self.plan.nodes)
            fitted = fit_constants(
                adapted, biases, texts.calibration, lambda d, t: self.progress("Fitting constants", d, t)
            )
            for module, update in fitted.items():
                parts[module].append(update)
        found = Approximation()
        if self.plan.fitted:
            self.strategy = "fitted"
            found = approximate(
                reference,
                self.plan.fitted,
                texts.calibration,
                kept=[_delta(module, update) for module, own in parts.items() for update in own],
                rank=self.rank,
                biases=False,
                progress=self.progress,
            )
            self.details["layer_errors"] = found.layer_errors
            for module, update in found.updates.items():
                parts.setdefault(module, []).append(update)
        self._take(parts)
        return Approximation(dict(self.updates), found.layer_errors)

    def _distill(self, reference: Reference, found: Approximation, texts: Texts) -> None:
        self.strategy = "distilled"
        better = refine(
            reference,
            found,
            [] if self.plan.taught else self.plan.fitted,
            texts.calibration,
            rank=self.rank,
            biases=False,
            schedule=self.schedule,
            progress=self.progress,
        )
        self._take({module: [update] for module, update in better.updates.items()})
        if better.distilled is not None:
            self.details["distillation"] = better.distilled.history
            self.details["distillation_step"] = better.distilled.best
            if better.distilled.interrupted:
                self.warnings.append(f"the distillation was interrupted; its best step was {better.distilled.best}")

    def _take(self, parts: Mapping[str, list[LowRank]]) -> None:
        """One update per module, of the rank allowed."""
        largest = self.rank if isinstance(self.rank, int) else 1.0
        self.updates = {}
        for module, several in parts.items():
            update, share = truncate(several[0] if len(several) == 1 else stack(several), largest)
            if update.left.shape[1]:
                self.updates[module] = LowRank(update.left.float().contiguous(), update.right.float().contiguous())
            self.lost[module] = max(share, self.lost.get(module, 0.0))


def _delta(module: str, update: LowRank) -> WeightDelta:
    return WeightDelta(module, a=update.right.float(), b=update.left.float())
