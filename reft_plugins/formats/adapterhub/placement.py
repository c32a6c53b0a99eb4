"""Where a bottleneck adapter of AdapterHub writes and what it reads, from its settings and the kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reft_plugins.errors import AdapterError

PRE_NORM = ("llama", "mistral", "gpt2")
PRE_NORM_HOOKED = ("qwen2", "qwen3")
"""Models without code of their own in `adapters`: its hooks leave the residual connection to the model."""
POST_NORM = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")

BRANCHES = {
    "attention": ("attention_output", "attention_residual", "mlp_residual"),
    "mlp": ("mlp_output", "mlp_residual", "block_output"),
}
"""Of each sub-layer: its output `y`, its residual input `x`, and the residual stream behind it."""


def placement(branch: str, config: Mapping[str, Any], model_type: str, where: str) -> tuple[str, str]:
    """The component that is written and the one that is read.

    With `bn` the bottleneck, `z = x + y` if `original_ln_before` else `y`, and `r = y` if `residual_before_ln` is true
    else `z`, the library computes `bn(z) + r`, `+ x` if `original_ln_after`; a model that normalises behind the
    residual connection puts that norm around `x + y` in `z` and around the whole. A parallel adapter computes
    `bn(x) + y + x`.

    Args:
        branch: `attention` or `mlp`.

    Raises:
        AdapterError: when no edit of one component computes that.
    """
    output, residual, stream = BRANCHES[branch]
    if model_type not in (*PRE_NORM, *PRE_NORM_HOOKED, *POST_NORM):
        raise AdapterError(
            f"{where}: where bottleneck adapters stand in a model of type {model_type} is not known here, or cannot be "
            f"expressed. Read are those for {', '.join((*PRE_NORM, *PRE_NORM_HOOKED, *POST_NORM))}"
        )
    before, after = bool(config.get("original_ln_before", False)), bool(config.get("original_ln_after", True))
    residual_before = config.get("residual_before_ln", True)
    settings = (
        f"original_ln_before={before}, original_ln_after={after}, residual_before_ln={residual_before!r}, "
        f"is_parallel={bool(config.get('is_parallel'))}"
    )
    if model_type in PRE_NORM_HOOKED and not after:
        raise AdapterError(f"{where}: {settings}: the library refuses this for {model_type}")
    if config.get("is_parallel"):
        if not after:
            raise AdapterError(f"{where}: {settings} takes the residual connection away, which cannot be expressed")
        return output, residual
    stream_is_residual = before and residual_before is not True
    if residual_before not in (True, False) and not (before and model_type in POST_NORM):
        raise AdapterError(f"{where}: {settings}: the library itself fails on this")
    if stream_is_residual + after != 1:
        what = "doubles" if stream_is_residual and after else "takes away"
        raise AdapterError(f"{where}: {settings} {what} the residual connection, which cannot be expressed")
    if model_type in POST_NORM and before and (after or residual_before == "post_add"):
        raise AdapterError(
            f"{where}: {settings} in a model of type {model_type}: the adapter reads the norm's output and writes what "
            "the norm reads, which cannot be expressed. Adapters with original_ln_before=False (double_seq_bn, par_bn) "
            "can be"
        )
    return (stream, stream) if before else (output, output)
