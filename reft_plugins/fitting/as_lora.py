"""Any adapter as a plain LoRA: low-rank changes of linear modules, no biases, with measured fidelity."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins import plugins
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import ExportError, UnsupportedProgramError
from reft_plugins.fidelity.evaluation import Evaluation
from reft_plugins.fidelity.gathering import enough_tokens, gather
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Texts
from reft_plugins.fitting.approximation import Progress
from reft_plugins.fitting.distillation import Schedule
from reft_plugins.fitting.lora_fit import LoraFit
from reft_plugins.fitting.lora_plan import EXACT, Held, LoraPlan, hold, make_plan
from reft_plugins.fitting.updates import LowRank
from reft_plugins.formats.peft.base_modules import BaseModules

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter


@dataclass(slots=True)
class LoraConversion:
    """A LoRA that stands in for an adapter.

    Attributes:
        updates: float32 factors by qualified module name, scaling included.
        lost: share of the squared singular values of a module's change that its rank cut off.
        strategy: `factors` (of the adapter's own weight changes), `fitted` or `distilled`.
        evaluation: against the adapter, on held-out text.
        details: of the fit; warnings: what could be better, in sentences.
    """

    adapter: Adapter
    base: BaseModel
    plan: LoraPlan
    held: dict[str, Held]
    updates: dict[str, LowRank]
    lost: dict[str, float]
    strategy: str
    texts: Texts
    evaluation: Evaluation
    seed: int = 0
    own_texts: Mapping[str, Path | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the factors are precisely what the adapter does, up to rounding."""
        return self.strategy == "factors" and not self.plan.widened and not self.cut

    @property
    def cut(self) -> list[str]:
        """Modules whose change needs more than the rank it was given."""
        return [module for module, share in self.lost.items() if share > EXACT]


def convert_to_lora(
    adapter: Adapter,
    base: str | Path,
    *,
    rank: float,
    approximate: bool = False,
    distill: bool = False,
    calibration: Path | None = None,
    calibration_tokens: int | None = None,
    held_out: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    progress: Progress = lambda step, done, total: None,
) -> LoraConversion:
    """Find the LoRA of an adapter, and measure it.

    Changes of linear modules become their factors: low-rank ones their own, others (DoRA, IA3, whole weights) those of
    the difference from the base's weight. Constants that would take a bias, edits and prefixes are fitted on
    calibration text. With `distill` everything is then trained to predict as the adapter, if it is not exact and
    misses the targets of `reft_plugins.fidelity.comparison`, or has nodes that nothing else reaches.

    Args:
        adapter: of this base model.
        rank: of a module at most, as an int; or as a float in (0, 1] the share of the squared singular values that
            every change and every fit keeps, as in PEFT's `convert_to_lora`.
        approximate: apply nodes that work at some positions at all of them.
        calibration, held_out, seed: see `reft_plugins.fidelity.gathering.gather`; calibration_tokens: by default ten
            per neuron of an MLP, at least 20,000.
        steps: of the distillation, by default those of `Schedule`.

    Raises:
        UnsupportedProgramError: naming a node that no LoRA of these options can hold.
        ExportError: no such rank; AdapterError, BaseModelError, DataError: see what is called.
    """
    _check(rank, adapter)
    opened = BaseModel.open(base)
    modules = BaseModules.of(opened)
    plan = make_plan(adapter.lower(), modules, approximate=approximate, distill=distill)
    held: dict[str, Held] = {}
    for module, deltas in plan.deltas.items():
        progress("Factorising changes of weights", len(held), len(plan.deltas))
        held[module] = hold(deltas, module, modules, rank)
    schedule = Schedule(seed=seed) if steps is None else Schedule(steps=steps, seed=seed)
    found = LoraFit(plan, held, rank, schedule, progress)
    neurons = int(opened.config.get("intermediate_size") or 4 * opened.identity.hidden_size)
    wanted = (calibration_tokens or enough_tokens(neurons)) if found.needs_text(distill) else 0
    runtime = plugins.runtimes.get("transformers")(base, dtype="float32")
    with closing(runtime):
        progress("Sampling text", 0, 0)
        texts = gather(
            runtime, adapter, calibration_tokens=wanted, calibration=calibration, held_out=held_out, seed=seed
        )
        evaluation = found.run(Reference(runtime, plan.program), runtime, adapter, texts, distill)
    own_texts = {"calibration": calibration, "held_out": held_out}
    conversion = LoraConversion(
        adapter, opened, plan, held, found.updates, found.lost, found.strategy, texts, evaluation, seed, own_texts
    )
    conversion.details, conversion.warnings = found.details, [*texts.warnings, *found.warnings]
    _warn(conversion)
    return conversion


def _check(rank: float, adapter: Adapter) -> None:
    if not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ExportError(
            f"rank {rank}: is a whole number from 1 on, or a share of the squared singular values above 0 and up to 1.0"
        )
    if adapter.manifest.task is not None:
        raise UnsupportedProgramError(
            f"the adapter ({adapter.manifest.method}) classifies texts, and its head is no LoRA. Use --to peft"
        )


def _warn(conversion: LoraConversion) -> None:
    plan, cut = conversion.plan, conversion.cut
    conversion.warnings += [f"{node}: widened to all positions" for node in plan.widened]
    if cut:
        conversion.warnings.append(
            f"{len(cut)} of {len(conversion.lost)} modules would need a higher rank: cutting loses up to "
            f"{max(conversion.lost.values()):.2%} of the squared singular values of a module's change"
        )
    if not conversion.exact and not conversion.evaluation.on_target:
        conversion.warnings.append("the LoRA misses its targets on some held-out text; see the table")
