"""A logistic regression on pooled hidden states: the classic use of a frozen model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reft_plugins.classification.features import Features
from reft_plugins.errors import DataError, TrainingError
from reft_plugins.manifest import BaseModelIdentity

if TYPE_CHECKING:
    from reft_plugins.adapter import Adapter

_USED = ("base", "adapter", "layer", "pool")
"""What must be equal between the features a classifier was fitted on and those it is applied to."""


@dataclass(frozen=True, slots=True, eq=False)
class LogisticClassifier:
    """`softmax(weight x + bias)`.

    Attributes:
        weight: float32 `[labels, hidden]`; bias: float32 `[labels]`, in the scale of raw features.
        labels: their names; provenance: of the features it was fitted on.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    labels: tuple[str, ...]
    provenance: dict[str, Any]

    @classmethod
    def fit(cls, features: Features, strength: float = 1.0, seed: int = 0) -> LogisticClassifier:
        """Fit by scikit-learn on standardised features; the standardisation is folded into the weights.

        Args:
            strength: inverse of the L2 penalty (scikit-learn's `C`).

        Raises:
            DataError: features without labels, or with one label only; TrainingError: scikit-learn is missing.
        """
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise TrainingError(
                f"a logistic regression is fitted by scikit-learn, which cannot be imported ({error}). "
                "pip install scikit-learn"
            ) from None
        labels = _labels(features)
        if len(set(labels)) < 2:
            raise DataError(f"every text has the label {labels[0]!r}, so there is nothing to tell apart")
        scaler = StandardScaler()
        scaled = scaler.fit_transform(features.values.astype(np.float64))
        model = LogisticRegression(C=strength, max_iter=2000, random_state=seed).fit(scaled, np.array(labels))
        weight, bias = model.coef_ / scaler.scale_, model.intercept_ - model.coef_ @ (scaler.mean_ / scaler.scale_)
        if len(weight) == 1:  # two labels: one number, the log-odds of the second
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        names = tuple(map(str, model.classes_))
        return cls(weight.astype(np.float32), bias.astype(np.float32), names, features.provenance)

    def probabilities(self, features: Features) -> npt.NDArray[np.float32]:
        """Float32 `[texts, labels]`.

        Raises:
            DataError: features of another model, adapter, layer or pooling.
        """
        for key in _USED:
            if (ours := _fact(self.provenance, key)) != (theirs := _fact(features.provenance, key)):
                raise DataError(f"the classifier was fitted on features of {key} {ours!r}, these are of {theirs!r}")
        logits = features.values @ self.weight.T + self.bias
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        result: npt.NDArray[np.float32] = powers / powers.sum(-1, keepdims=True)
        return result

    def predict(self, features: Features) -> list[str]:
        """The most probable label of each text; raises as `probabilities`."""
        return [self.labels[best] for best in self.probabilities(features).argmax(-1)]

    def accuracy(self, features: Features) -> float:
        """Share of texts that get their own label."""
        return float(np.mean([a == b for a, b in zip(self.predict(features), _labels(features), strict=True)]))

    def adapter(self, base: str | Path) -> Adapter:
        """The same classifier as a `head` adapter, which `classify` of a runtime serves beside others.

        That needs a base model whose head is one linear module on the last token's last state (decoders' `score`), and
        features that are just that: layer -1, pool `last`, no adapter.

        Raises:
            BaseMismatchError: features of another base model.
            DataError: other features, or a base model with another head.
        """
        import torch

        from reft_plugins.adapter import Adapter
        from reft_plugins.base_model import check_base, identify, locate
        from reft_plugins.classification.models import head_parameters, open_classifier
        from reft_plugins.manifest import TaskFact

        read = tuple(self.provenance.get(key) for key in ("layer", "pool", "adapter"))
        with torch.random.fork_rng(devices=[]):
            model = open_classifier(locate(base), self.labels, 0)
        if set(head_parameters(model)) != {"score.weight"} or read != (-1, "last", None):
            raise DataError(
                f"a classifier of features of layer, pool, adapter {read} is no head of {type(model).__name__}: that "
                "must be one linear module on the last token's last state, without an adapter"
            )
        tensors = {"score.weight": torch.from_numpy(self.weight), "score.bias": torch.from_numpy(self.bias)}
        fact = TaskFact(name="sequence_classification", labels=self.labels)
        adapter = Adapter.create("head", {}, tensors, BaseModelIdentity(**self.provenance["base"]), task=fact)
        check_base(adapter.manifest, identify(base))
        return adapter

    def save(self, path: str | Path) -> Path:
        """Write safetensors: `weight` and `bias`, with labels and provenance in the metadata."""
        from safetensors.numpy import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"labels": json.dumps(self.labels), "provenance": json.dumps(self.provenance, sort_keys=True)}
        tensors = {"weight": np.ascontiguousarray(self.weight), "bias": self.bias}
        save_file(tensors, path, metadata={"format": "reft-logistic/1", **about})
        return path

    @classmethod
    def load(cls, path: str | Path) -> LogisticClassifier:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, or is not a classifier.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                about = file.metadata() or {}
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            labels, provenance = json.loads(about["labels"]), json.loads(about["provenance"])
            if about["format"] != "reft-logistic/1" or not len(labels) == len(weight) == len(bias):
                raise ValueError("its parts do not fit together")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path}: not a classifier saved by `reft features --classifier-out`: {error}") from None
        return cls(weight, bias, tuple(labels), provenance)


def split(features: Features, share: float = 0.2, seed: int = 0) -> tuple[Features, Features]:
    """Two parts with the same mix of labels, the second of about `share` of the texts.

    Raises:
        DataError: a label with one text only, or features without labels.
    """
    labels = np.array(_labels(features))
    draw = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in sorted(set(labels)):
        rows = draw.permutation(np.flatnonzero(labels == label))
        if len(rows) < 2:
            raise DataError(f"label {label!r} has one text only, so none can be held out; give held-out texts (--eval)")
        held[rows[: max(1, round(share * len(rows)))]] = True
    return _part(features, labels, ~held), _part(features, labels, held)


def _fact(provenance: dict[str, Any], key: str) -> Any:
    value = provenance.get(key)
    return value.get("fingerprint") if isinstance(value, dict) else value


def _part(features: Features, labels: Any, chosen: Any) -> Features:
    return Features(features.values[chosen], tuple(map(str, labels[chosen])), features.provenance)


def _labels(features: Features) -> Sequence[str]:
    if features.labels is None:
        raise DataError('the texts have no labels; write {"text": "…", "label": "…"} per line')
    return features.labels
