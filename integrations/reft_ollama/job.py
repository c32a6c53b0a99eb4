"""One export: what is known before the model is loaded, and the choice of the weights to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig

from reft_ollama.architectures.base import Architecture
from reft_ollama.architectures.table import architecture_of
from reft_ollama.candidates import Candidate, Candidates, Fitting
from reft_ollama.measuring import measure_file
from reft_ollama.plan.constant_prefix import PrefixChanges, prefix_changes
from reft_ollama.plan.planning import Plan, make_plan
from reft_ollama.prompts import Prompts, prepare_prompts
from reft_ollama.templates.licenses import find_licenses
from reft_ollama.templates.modelfile import Modelfile, make_parameters
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.tokenizers.loading import load_tokenizer
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.final_states import measure_final_states
from reft_ollama.weights.formats import FORMATS
from reft_ollama.weights.installation import install
from reft_ollama.weights.rounding import Rounded
from reft_ollama.weights.stack import Weights
from reft_plugins.base_model import identify, locate
from reft_plugins.errors import ExportError
from reft_plugins.fidelity.certificate import summary
from reft_plugins.fidelity.comparison import EXACT_DIFFERENCE
from reft_plugins.fidelity.evaluation import Evaluation, Evaluator
from reft_plugins.fidelity.front import Front
from reft_plugins.fidelity.gathering import TOKENS_PER_NEURON, enough_tokens, gather
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Texts
from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.program import Program

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reft_plugins.adapter import Adapter

VIRTUAL_PROBABILITY = 1e-6
"""Of a virtual token being generated, at which a user is told."""


@dataclass(slots=True)
class Job:
    """An export in progress; `weights`, `strategy` and `evaluations` are known after `choose_weights`."""

    adapter: Adapter
    base_name: str
    directory: Path
    identity: BaseModelIdentity
    config: PretrainedConfig
    architecture: Architecture
    program: Program
    plan: Plan
    checkpoint: Checkpoint
    prompts: Prompts
    parameters: dict[str, Any]
    progress: Callable[[str, int, int], None]
    warnings: list[str] = field(default_factory=list)
    system: str | None = None
    adapter_folder: Path | None = None
    strategy: str = "merged"
    details: dict[str, Any] = field(default_factory=dict)
    texts: Texts | None = None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    _weights: Weights | None = None
    _evaluator: Evaluator | None = None
    _front: Front = field(default_factory=Front)

    @classmethod
    def prepare(
        cls, adapter: Adapter, base: str | Path, approximate: bool, progress: Callable[[str, int, int], None]
    ) -> Job:
        """Check everything that can be refused without loading the model. Raises as `export_ollama`."""
        directory = locate(base)
        config = AutoConfig.from_pretrained(directory)
        architecture = architecture_of(config)
        program = adapter.lower()
        tokenizer = load_tokenizer(directory)
        prompts = prepare_prompts(program, architecture, tokenizer, convert_tokenizer(tokenizer, config.vocab_size))
        plan = make_plan(Program(tuple(prompts.others)), architecture, config, approximate)
        plan.on_prefix = prompts.on_beginning
        has_own = (directory / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(directory) if has_own else GenerationConfig.from_dict({})
        parameters = make_parameters(tokenizer, generation, prompts.chat)
        if prompts.num_keep:
            parameters["num_keep"] = prompts.num_keep
        widened = [f"{node}: widened to all positions" for node in plan.widened]
        return cls(
            adapter=adapter,
            base_name=adapter.manifest.base.name if adapter.manifest.base else str(base),
            directory=directory,
            identity=identify(base),
            config=config,
            architecture=architecture,
            program=program,
            plan=plan,
            checkpoint=Checkpoint(directory),
            prompts=prompts,
            parameters=parameters,
            progress=progress,
            warnings=[
                *architecture.warnings(config),
                *widened,
                *plan.warnings,
                *prompts.tokenizer.warnings,
                *prompts.chat.warnings,
            ],
        )

    @property
    def name(self) -> str:
        """`general.name` of the file."""
        return f"{self.base_name} with {self.adapter.manifest.method}"

    @property
    def weights(self) -> Weights:
        """The parameters to write."""
        assert self._weights is not None
        return self._weights

    def take_exact_weights(self) -> None:
        """Take the weights of an exact plan without running the model.

        Raises:
            ExportError: the plan is not exact.
        """
        if not self.plan.exact:
            node = [*self.plan.remainder, *self.plan.widened][0]
            raise ExportError(f"{node}: weights only approximate it, which has to be measured. Leave out --no-measure")
        self._weights = assemble(self.plan, self.checkpoint, self.architecture, self.config)

    def choose_weights(
        self,
        runtime: Any,
        *,
        fitting: Fitting,
        dtypes: Sequence[str],
        calibration: Path | None,
        calibration_tokens: int | None,
        held_out: Path | None,
    ) -> None:
        """Find the weights to write, and measure them in every format that is written directly.

        Changes the runtime's model, of which only one is in memory. Files of other formats are measured by
        `measure_files`, without it.
        """
        self.progress("Sampling text", 0, 0)
        neurons = int(self.config.intermediate_size)
        wanted = (
            (calibration_tokens or enough_tokens(neurons)) if self.plan.remainder or fitting.distills(self.plan) else 0
        )
        texts = gather(
            runtime,
            self.adapter,
            calibration_tokens=wanted,
            calibration=calibration,
            held_out=held_out,
            seed=fitting.seed,
        )
        self.texts = texts = texts.beginning_with(self.prompts.beginning, self.prompts.shortest)
        self.warnings += texts.warnings
        if 0 < wanted < TOKENS_PER_NEURON * neurons:
            self.warnings.append(f"{wanted} calibration tokens are few for {neurons} neurons")
        reference = Reference(runtime, self.program, self.prompts.beginning)
        self.progress("Running the adapter on held-out text", 0, 0)
        if self.plan.on_prefix:
            self.plan.prefix_changes = self._prefix_changes(reference)
        if self.plan.virtual_tokens is not None or self.plan.on_prefix:
            norm = self.architecture.final_norm
            self.plan.final_states = measure_final_states(reference, texts.held_out, norm)
        self._evaluator = evaluator = Evaluator(reference, runtime, self.adapter, texts.held_out)
        direct = [dtype for dtype in dtypes if FORMATS[dtype].direct]
        first = direct[0] if direct else "f16"
        candidates = Candidates(
            self.plan,
            self.checkpoint,
            self.architecture,
            self.config,
            fitting,
            reference,
            texts.calibration,
            self.progress,
        )
        chosen = self._best(candidates, first, reference, evaluator)
        self.strategy, self._weights, self.details = chosen.strategy, chosen.weights, chosen.details
        self.warnings += chosen.warnings
        self._install(first, reference)
        for index, dtype in enumerate(direct):
            if index:
                self._install(dtype, reference)
            self.progress(f"Measuring {dtype}", 0, 0)
            self.evaluations[dtype] = evaluator.installed()
        self._front = reference.front
        evaluator.release_model()

    def _prefix_changes(self, reference: Reference) -> PrefixChanges:
        return prefix_changes(
            reference, self.prompts.others, self.prompts.beginning, self.architecture.layer, self.architecture.mlp_norm
        )

    def measure_files(self, paths: Mapping[str, Path]) -> None:
        """Measure written files by their formats, those that `choose_weights` has not measured, in llama.cpp.

        Raises:
            ReftError: llama.cpp refuses a file.
        """
        for dtype, path in paths.items():
            if self._evaluator is not None and dtype not in self.evaluations:
                self.progress(f"Measuring {dtype} in llama.cpp", 0, 0)
                self.evaluations[dtype] = measure_file(path, self._evaluator, self._front)

    def close(self) -> None:
        """Free what measuring keeps on disk."""
        if self._evaluator is not None:
            self._evaluator.close()

    def modelfile(self, source: str, dtype: str) -> Modelfile:
        """The Modelfile beside a GGUF file called `source`, with the measured fidelity of its format in comments."""
        kind = "exact" if self.plan.exact else "approximated"
        return Modelfile(
            source=source,
            template=self.prompts.chat.text,
            parameters=self.parameters,
            system=self.system,
            licenses=find_licenses(self.directory, self.adapter_folder, notes=self.adapter.manifest.notes),
            comments=[
                f"{self.name}, exported by reft-plugins ({kind}, {self.strategy})",
                f"adapter {self.adapter.digest}",
                *summary(self.evaluations.get(dtype)),
                *self.warnings,
            ],
        )

    def _best(self, candidates: Candidates, dtype: str, reference: Reference, evaluator: Evaluator) -> Candidate:
        """The first candidate on target, else the one with the smallest divergence."""
        measured: list[tuple[float, Candidate]] = []
        strategies = candidates.strategies
        for strategy in strategies:
            candidate = candidates.make(strategy)
            if len(strategies) == 1:
                return candidate
            self.progress("Measuring the exported weights on held-out text", 0, 0)
            self._weights = candidate.weights
            self._install(dtype, reference)
            found = evaluator.predictions()
            if found.on_target:
                return candidate
            measured.append((found.fidelity.mean_kl, candidate))
        return min(measured, key=lambda each: each[0])[1]

    def _install(self, dtype: str, reference: Reference) -> None:
        install(Rounded(self.weights, dtype), self.architecture, reference.model, torch.float32)

    def judge(self) -> None:
        """Warn of what the file costs or does not do, and of what was measured and should be better."""
        self.warnings += getattr(self.weights, "warnings", [])
        if not self.plan.exact and not all(evaluation.on_target for evaluation in self.evaluations.values()):
            advice = "; --distill may bring it closer" if self.strategy in ("low-rank", "merged") else ""
            self.warnings.append(f"the approximation misses its targets on some held-out text; see the table{advice}")
        for dtype, evaluation in self.evaluations.items():
            if (evaluation.virtual_probability or 0.0) > VIRTUAL_PROBABILITY:
                self.warnings.append(
                    f"{dtype}: a virtual token is generated with a probability of up to "
                    f"{evaluation.virtual_probability:.1e} on held-out text"
                )
        full = self.evaluations.get("f32")
        if self.plan.exact and full is not None and full.fidelity.max_logit_difference > EXACT_DIFFERENCE:
            self.warnings.append(f"an exact export should differ by at most {EXACT_DIFFERENCE} in its logits")
