"""Ways to write what weights cannot hold exactly, the one that costs the file least first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from reft_ollama.architectures.base import Architecture
from reft_ollama.plan.planning import Plan
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.installation import install
from reft_ollama.weights.stack import BaseWeights, Updated, Weights
from reft_ollama.weights.widening import Widening
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.approximation import Approximation, approximate, refine
from reft_plugins.fitting.distillation import Schedule
from reft_plugins.fitting.updates import AffineOutput, Update

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Fitting:
    """How to approximate.

    Attributes:
        strategy: see `reft_ollama.export.export_ollama`; distill: whether `auto` may distil.
        rank: of updates, None for the defaults of `reft_plugins.fitting.approximation`.
        steps: of the distillation; seed: of its order.
    """

    strategy: str = "auto"
    distill: bool = False
    rank: int | None = None
    steps: int = 200
    seed: int = 0

    def distills(self, plan: Plan) -> bool:
        """Whether a plan may be distilled."""
        return not plan.exact and (self.distill or self.strategy == "distilled")


@dataclass(slots=True)
class Candidate:
    """Weights that could be written.

    Attributes:
        strategy: `merged`, `low-rank`, `distilled` or `neurons`; details: of it; warnings: what it costs.
    """

    strategy: str
    weights: Weights
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Candidates:
    """The candidates of one plan, each made when it is asked for.

    What is fitted is fitted on the base model, with the nodes that the plan holds exactly executed as they are.

    Args:
        texts: to fit on.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        architecture: Architecture,
        config: PretrainedConfig,
        fitting: Fitting,
        reference: Reference,
        texts: Sequence[Text],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._plan, self._checkpoint, self._architecture, self._config = plan, checkpoint, architecture, config
        self._fitting, self._reference, self._texts, self._progress = fitting, reference, texts, progress
        self._regression: Approximation | None = None
        self._norms: dict[int, tuple[float, float]] = {}
        if "neurons" in self.strategies:
            self._norms = self._measure_norms()

    @property
    def strategies(self) -> list[str]:
        """What is tried, in order: the smaller model first, and what takes long only if asked for.

        Raises:
            UnsupportedProgramError: the strategy asked for does not suit the program or the base; says what does.
        """
        asked, plan = self._fitting.strategy, self._plan
        if plan.exact:
            return ["merged"]
        neurons = bool(plan.residual) and self._architecture.output_bias and not self._architecture.post_norm
        if asked == "neurons" and plan.remainder and not neurons:
            raise UnsupportedProgramError(
                f"{plan.remainder[0]}: strategy neurons is for affine edits of block_output, on bases whose file may "
                "have biases. Use low-rank or distilled"
            )
        if not plan.remainder:
            return ["merged", "distilled"] if self._fitting.distills(plan) else ["merged"]
        if asked != "auto":
            return [asked]
        return ["low-rank", *(["distilled"] if self._fitting.distill else []), *(["neurons"] if neurons else [])]

    def make(self, strategy: str) -> Candidate:
        """The weights of one of `strategies`; changes the model of the reference."""
        if strategy == "merged":
            return Candidate(strategy, self._export())
        if strategy == "neurons":
            return self._neurons()
        base = BaseWeights(self._checkpoint, self._architecture, self._config)
        install(base, self._architecture, self._reference.model, torch.float32)
        if self._regression is None:
            self._regression = approximate(
                self._reference, self._plan.remainder, self._texts, progress=self._progress, **self._options
            )
        details: dict[str, Any] = {"layer_errors": self._regression.layer_errors}
        if strategy == "low-rank":
            return Candidate(strategy, self._fitted(self._regression), details)
        return self._distilled(self._regression, details)

    @property
    def _options(self) -> dict[str, Any]:
        kept = [*self._plan.on_prefix, *self._plan.kept]
        return {"kept": kept, "rank": self._fitting.rank, "biases": self._may_have_bias}

    def _may_have_bias(self, module: str) -> bool:
        architecture = self._architecture
        outputs = (architecture.attention_output, architecture.mlp_output)
        return architecture.output_bias and not architecture.post_norm and module.endswith(outputs)

    def _distilled(self, regression: Approximation, details: dict[str, Any]) -> Candidate:
        schedule = Schedule(steps=self._fitting.steps, seed=self._fitting.seed)
        found = refine(
            self._reference,
            regression,
            self._plan.remainder,
            self._texts,
            schedule=schedule,
            progress=self._progress,
            **self._options,
        )
        assert found.distilled is not None
        details |= {"distillation": found.distilled.history, "distillation_step": found.distilled.best}
        warnings = []
        if found.distilled.interrupted:
            warnings.append(f"the distillation was interrupted; the factors are those of step {found.distilled.best}")
        return Candidate("distilled", self._fitted(found), details, warnings)

    def _neurons(self) -> Candidate:
        plan, module = self._plan, self._architecture.module
        weights = Updated(BaseWeights(self._checkpoint, self._architecture, self._config), plan.updates)
        gains = {layer: weights.module(module(layer, "mlp_norm"))["weight"] for layer in self._norms}
        widening = Widening(self._config, plan.residual, self._norms, gains)
        updates: dict[str, list[Update]] = {
            module(layer, "mlp_output"): [AffineOutput(edit)] for layer, edit in plan.residual.items()
        }
        channels, neurons = widening.added
        details = {"added_channels": channels, "added_neurons": neurons, "norm_error": widening.error}
        warning = f"the model grew by {channels} residual channels and {neurons} neurons per layer"
        return Candidate("neurons", self._export(updates, widening), details, [warning])

    def _measure_norms(self) -> dict[int, tuple[float, float]]:
        layers = {layer: self._architecture.module(layer, "mlp_norm") for layer in self._plan.residual}
        self._progress("Measuring the residual stream", 0, 0)
        return self._reference.norms(self._texts, layers)

    def _fitted(self, found: Approximation) -> Weights:
        return self._export({name: [update] for name, update in found.updates.items()})

    def _export(self, fitted: dict[str, list[Update]] | None = None, widening: Widening | None = None) -> Weights:
        return assemble(self._plan, self._checkpoint, self._architecture, self._config, fitted, widening)
