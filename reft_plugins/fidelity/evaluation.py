"""Everything that is measured of an exported model, in one place: predictions, hidden states and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reft_plugins.fidelity.answers import AnswerAgreement, Answers, Generate
from reft_plugins.fidelity.comparison import Fidelity
from reft_plugins.fidelity.layers import LayerError, LayerStates
from reft_plugins.fidelity.records import Record
from reft_plugins.fidelity.reference import Measurement, Reference, Student
from reft_plugins.fidelity.texts import Text

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter


class Evaluation(Record):
    """A model held against the adapter on held-out text.

    Attributes:
        fidelity: of predictions, over all text; sources: by source of text.
        layers: error of the state behind every layer, empty where a student shows only its logits.
        answers: agreement of greedy answers, None where a student does not generate.
        virtual_probability: the largest probability of a virtual token anywhere, None where there are none.
    """

    fidelity: Fidelity
    sources: dict[str, Fidelity] = {}
    layers: tuple[LayerError, ...] = ()
    answers: AnswerAgreement | None = None
    virtual_probability: float | None = None

    @property
    def on_target(self) -> bool:
        """Whether an approximation is as good as it should be on every source of text."""
        return all(fidelity.on_target for fidelity in (self.fidelity, *self.sources.values()))

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, as they are written."""
        return self.model_dump(mode="json")


class Evaluator:
    """Runs the adapter once, and then measures any number of models against it.

    What the adapter computes is kept on disk, so that the model can be changed in place; memory does not grow with the
    text.

    Args:
        reference: the base model with the adapter's program; runtime: the transformers runtime it was made of.
        texts: held-out.
    """

    def __init__(self, reference: Reference, runtime: Any, adapter: Adapter, texts: Sequence[Text]) -> None:
        self._reference = reference
        self._answers = Answers(runtime, adapter, texts)
        self._states = LayerStates(reference, texts)
        self._predictions = Measurement(reference, texts)

    def predictions(self) -> Evaluation:
        """The model of `reference` as it is now, without what takes longer: enough to choose between candidates."""
        return self._evaluation(self._predictions.compare())

    def installed(self) -> Evaluation:
        """The model of `reference` as it is now."""
        answers = self._answers.compare(front=self._reference.front)
        return self._evaluation(self._predictions.compare(), self._states.compare(), answers)

    def student(self, logits: Student, generate: Generate | None = None) -> Evaluation:
        """Any other model, for example a quantised file in llama.cpp.

        Args:
            logits: of a text, float32 `[len(token_ids), vocabulary or more]`.
            generate: greedy answers; without it answers are not compared.
        """
        answers = None if generate is None else self._answers.compare(generate)
        return self._evaluation(self._predictions.compare(logits), answers=answers)

    def release_model(self) -> None:
        """Let go of the reference's model; from now on only a `student` can be measured."""
        self._reference.model = None

    def close(self) -> None:
        """Free the disk space."""
        self._predictions.close()
        self._states.close()

    def _evaluation(
        self, found: dict[str, Fidelity], layers: tuple[LayerError, ...] = (), answers: AnswerAgreement | None = None
    ) -> Evaluation:
        sources = {name: fidelity for name, fidelity in found.items() if name != "overall"}
        return Evaluation(
            fidelity=found["overall"],
            sources=sources,
            layers=layers,
            answers=answers,
            virtual_probability=self._predictions.virtual_probability,
        )
