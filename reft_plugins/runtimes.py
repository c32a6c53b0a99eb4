"""What a runtime offers, and what all runtimes share: admitting an adapter only onto its own base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from reft_plugins.base_model import check_base
from reft_plugins.errors import AdapterError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from reft_plugins.adapter import Adapter
    from reft_plugins.manifest import BaseModelIdentity, Manifest

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer: the new tokens only, and their text without special tokens."""

    token_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Classification:
    """The most probable label of a text, and the probability of each."""

    label: str
    probabilities: dict[str, float]


class Runtime(Protocol):
    """A base model that runs adapters. `adapter` is an Adapter, a reference (path, `name:tag`) or None for the base."""

    def logits(self, token_ids: list[int], adapter: Adapter | str | Path | None = None) -> npt.NDArray[np.float32]:
        """Next-token logits of a prompt: float32 `[len(token_ids), vocabulary]`, up to a constant per row.

        Raises:
            BaseMismatchError: the adapter belongs to another base model.
            UnsupportedProgramError: this runtime cannot execute a node of its program.
            ValueError: the prompt has no tokens.
        """

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[Adapter | str | Path | None] | None = None,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Answer all prompts as one batch, each under its own adapter; greedy at temperature 0. Raises as `logits`."""

    def close(self) -> None:
        """Free the model; the runtime cannot be used afterwards."""


def admit(
    adapter: Adapter | str | Path | None,
    base: BaseModelIdentity,
    allow_base_mismatch: bool = False,
    classifies: bool = False,
) -> Adapter | None:
    """Load what a caller of a runtime passed, and refuse it if it was made for another base model, or another task.

    Args:
        classifies: whether the runtime labels texts, rather than going on with them.

    Raises:
        UnknownReferenceError, AdapterError, BaseMismatchError.
    """
    if adapter is None:
        return None
    from reft_plugins.loading import load

    loaded = load(adapter)
    check_base(loaded.manifest, base, allow_base_mismatch)
    refuse_idle(loaded.manifest)
    if (loaded.manifest.task is not None) != classifies:
        done, other = (
            ("classifies texts", ', task="sequence_classification"') if not classifies else ("has no labels", "")
        )
        raise AdapterError(
            f"the adapter ({loaded.manifest.method}) {done}, which this runtime is not for. "
            f'Use reft.runtime("transformers", base{other})'
        )
    return loaded


def refuse_idle(manifest: Manifest) -> None:
    """Refuse an adapter whose program is empty: answers would be the bare base's, and nobody would notice.

    Raises:
        AdapterError: always then.
    """
    facts = manifest.program
    if not (facts.edits or facts.weight_deltas or facts.other_nodes):
        raise AdapterError(
            f"the adapter ({manifest.method}) changes nothing by itself. A rotation acts with the cached values of a "
            "source prompt: `reft interchange` makes an adapter of them"
        )


def one_per_prompt(
    prompts: Sequence[Prompt], adapters: Sequence[Adapter | str | Path | None] | None
) -> list[Adapter | str | Path | None]:
    """The adapter of each prompt.

    Raises:
        ValueError: when there are not as many adapters as prompts.
    """
    if adapters is None:
        return [None] * len(prompts)
    if len(adapters) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(adapters)} adapters; pass one per prompt, None for the base")
    return list(adapters)
