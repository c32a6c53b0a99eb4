"""Refusing what is not faithful enough."""

from __future__ import annotations

from reft_plugins.errors import ExportError
from reft_plugins.fidelity.evaluation import Evaluation


def require_top1(evaluation: Evaluation, what: str, min_top1: float, ways: str) -> None:
    """Check the share of predictions with the adapter's first choice.

    Args:
        what: was measured; ways: what a user can do about it, as a sentence without its full stop.

    Raises:
        ExportError: with the numbers and the ways out.
    """
    fidelity = evaluation.fidelity
    if fidelity.top1_agreement >= min_top1:
        return
    raise ExportError(
        f"{what} would choose another token than the adapter in {1 - fidelity.top1_agreement:.1%} of "
        f"{fidelity.tokens} held-out predictions (top-1 agreement {fidelity.top1_agreement:.3f}, at least {min_top1} "
        f"is asked for; mean KL {fidelity.mean_kl:.4f} nats). Nothing was written. {ways}; or write it nevertheless "
        "with --force"
    )
