"""What the output layer reads while an adapter runs, from which follows how an output row is kept from winning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn

from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text

MAX_TOKENS = 4096
"""States that are kept at most."""

PROBES, PROBE_LENGTH = 16, 64
"""Texts of random tokens that are run besides, for states unlike those of the texts."""

MARGIN_SHARE, CHECKED_SHARE = 0.1, 0.8
"""A direction must be this good: its smallest product with a state against the best possible one, and the smallest with
states it was not found from against the smallest with those it was."""

_STEPS, _GAP = 300, 1e-3


@dataclass(frozen=True, eq=False)
class FinalStates:
    """Hidden states of the last layer.

    Attributes:
        normalised: behind the final norm, float32 `[tokens, hidden]`.
        sizes: root mean squares in front of it, float64 `[tokens]`.
    """

    normalised: Tensor
    sizes: Tensor

    def widened(self, hidden: int) -> FinalStates:
        """The same in a model of a larger hidden size, whose further channels are zero."""
        return FinalStates(nn.functional.pad(self.normalised, (0, hidden - self.normalised.shape[1])), self.sizes)

    @cached_property
    def direction(self) -> Tensor | None:
        """A vector `[hidden]`, float64, whose product with every state is at least `CHECKED_SHARE`; None without one.

        The shortest vector of the states' convex hull has the same product, its squared length, with the states nearest
        to it and a larger one with all others (Gilbert 1966, SIAM J. Control 4, finds it step by step); it is zero
        where no such direction exists. Half of the states find it, with a product of at least 1; the other half check.
        """
        found, check = self.normalised[::2].double(), self.normalised[1::2].double()
        if not len(check):
            return None
        point = found.mean(0)
        for _ in range(_STEPS):
            products = found @ point
            gap = point @ point - products.min()
            if gap <= _GAP * (point @ point):
                break
            step = found[products.argmin()] - point
            point = point + (gap / step.square().sum()).clamp(max=1.0) * step
        margin = (found @ point).min()
        if margin <= MARGIN_SHARE * (point @ point) or (check @ point).min() < CHECKED_SHARE * margin:
            return None
        return point / margin


def measure_final_states(reference: Reference, texts: Sequence[Text], norm: str) -> FinalStates:
    """Run the adapter on random tokens, and then on texts.

    Args:
        norm: name of the final norm.
    """
    normalised: list[Tensor] = []
    sizes: list[Tensor] = []
    module = reference.model.get_submodule(norm)
    probes, others = reference.batches(_probes(reference, texts), logits=False), reference.batches(texts, logits=False)
    for _, batch in chain(probes, others):

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, mask: Tensor = batch.mask) -> None:
            own, real = slice(-mask.shape[1], None), mask.bool()
            normalised.append(output[:, own][real].float().cpu())
            sizes.append(args[0][:, own][real].double().square().mean(-1).sqrt().cpu())

        handle = module.register_forward_hook(keep)
        try:
            with reference.running(batch, reference.program):
                reference.forward(batch, logits=False)
        finally:
            handle.remove()
        if sum(map(len, sizes)) >= MAX_TOKENS:
            break
    return FinalStates(torch.cat(normalised), torch.cat(sizes))


def _probes(reference: Reference, texts: Sequence[Text]) -> list[Text]:
    """Random tokens behind the beginnings of texts, which a program may know."""
    generator = torch.Generator().manual_seed(0)
    probes = []
    for text in list(texts)[:PROBES]:
        begun = text.tokens[: min(text.prompt_length, PROBE_LENGTH)]
        tokens = torch.randint(reference.vocabulary, (PROBE_LENGTH,), generator=generator).tolist()
        whole = (*begun, *tokens)[: max(PROBE_LENGTH, len(text.tokens))]
        probes.append(Text(whole, len(begun), "random tokens"))
    return probes
