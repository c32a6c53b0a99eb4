"""One strong adapter of every kind that the vLLM plugin serves, for one base model."""

from __future__ import annotations

from pathlib import Path

from strong_programs import Strong

from reft_plugins.adapter import Adapter
from reft_plugins.program import COMPONENTS, WeightDelta

KINDS_OF_ACTIVATION = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "elu")


def edits_of_every_kind(base: Path, strength: float = 1.0) -> dict[str, Adapter]:
    """Adapters of methods that edit representations, and programs of edits."""
    strong = Strong(base, 1, strength)
    last = strong.identity.num_hidden_layers - 1
    ends = (0, last)
    parallel = {"attention_output": "block_input", "mlp_output": "mlp_residual"}
    return {
        "loreft shared": strong.of_method("loreft", "f2+l2", ends),
        "loreft unshared, overlapping": strong.of_method("loreft", "f9+l9", ends, shared=False),
        "loreft capped": strong.of_method("loreft", "f7+l7;cap=half", ends),
        "loreft all": strong.of_method("loreft", "all", ends),
        "loreft prompt": strong.of_method("loreft", "prompt;trim=1", ends, activation="tanh"),
        "loreft generated": strong.of_method("loreft", "generated", (0,)),
        "loreft last, relu": strong.of_method("loreft", "l1", ends, activation="relu"),
        "direft": strong.of_method("direft", "f3+l1", ends, activation="gelu"),
        "noreft": strong.of_method("noreft", "f1+l3", ends, activation="silu"),
        "direft orthonormal": strong.of_method("direft_orthonormal", "l4", ends),
        "consreft": strong.of_method("consreft", "f2+l2", ends),
        "red": strong.of_method("red", "all", ends, "mlp_output"),
        "red of values": strong.of_method("red", "f2+l3", ends, "attention_value_output"),
        "steering": strong.of_method("steering", "all", (last // 2,)),
        "steering of activations": strong.of_method("steering", "generated", (0,), "mlp_activation"),
        "parallel bottlenecks": strong.bottleneck(ends, parallel, "all", "relu"),
        "bottlenecks of the last token": strong.bottleneck(ends, {"block_output": "mlp_residual"}, "l1", "gelu"),
        "every component": strong.adapter(
            [
                strong.low_rank(index % (last + 1), "f2+l2" if index % 2 else "all", component, activation=activation)
                for index, (component, activation) in enumerate(zip(COMPONENTS, KINDS_OF_ACTIVATION, strict=True))
            ]
        ),
        "single positions": strong.adapter(
            [strong.low_rank(0, f"[{index}]") for index in (0, 1, 2, 3, 5, 8, 13, -1, -2, -4, -7)],
            [strong.low_rank(last, f"[{first},{second}]") for first, second in ((0, -1), (5, -3), (4, 6), (-30, 2))],
        ),
        "sequential": strong.adapter(
            [strong.low_rank(0, where, activation="relu", strength=0.6) for where in ("f4", "all", "l3", "f2+l5")],
            strong.element_wise(0, "l2"),
        ),
        "simultaneous": strong.adapter(
            [
                strong.low_rank(last, where, activation="tanh", simultaneous=bool(index), strength=0.6)
                for index, where in enumerate(("f4", "all", "l3", "f2+l5"))
            ],
            strong.low_rank(last, "prompt", activation="elu"),
            strong.low_rank(last, "l1", simultaneous=True),
        ),
    }


def weights_of_every_kind(base: Path, attention: tuple[str, ...], feed_forward: tuple[str, ...]) -> dict[str, Adapter]:
    """Adapters that change weights.

    Args:
        attention: last names of the projections into attention, the output projection, in this order.
        feed_forward: of the MLP, its output projection last.
    """
    strong = Strong(base, 2)
    every = strong.modules(*attention, *feed_forward)
    values, output, down = attention[-2], attention[-1], feed_forward[-1]
    scaled = (*(attention[1:-1] or attention[:1]), down)
    kept_whole = strong.modules(attention[0], output, down)
    return {
        "lora": strong.weights("lora", every),
        "lora of the prompt": strong.adapter([strong.lora(module, positions="prompt") for module in every]),
        "lora of its ends": strong.adapter([strong.lora(module, positions="f3+l2") for module in kept_whole]),
        "lora of answers": strong.adapter([strong.lora(module, positions="generated") for module in every]),
        "rslora": strong.weights("lora", strong.modules(attention[0], down), use_rslora=True),
        "dora": strong.weights("lora", every, use_dora=True),
        "dora with biases": strong.adapter([strong.dora(module, bias=True) for module in kept_whole]),
        "ia3": strong.weights("ia3", strong.modules(*scaled), target_modules=scaled, feedforward_modules=(down,)),
        "biases": strong.adapter(
            [WeightDelta(module, bias=strong.normal(strong.sizes[module][0]) * 0.3) for module in every]
        ),
        "everything at once": strong.adapter(
            strong.low_rank(0, "f2"),
            [strong.lora(module) for module in strong.modules(attention[0])],
            [strong.dora(module) for module in strong.modules(output)],
            [strong.lora(module, positions="l2") for module in strong.modules(feed_forward[0])],
            [WeightDelta(m, output_scale=strong.scales(strong.sizes[m][0])) for m in strong.modules(values)],
            strong.element_wise(0, "all", "mlp_output"),
            strong.low_rank(1, "l1", "mlp_output", reads="mlp_residual", activation="relu"),
            [WeightDelta(m, input_scale=strong.scales(strong.sizes[m][1])) for m in strong.modules(down)],
        ),
    }


def prompts_of_every_kind(base: Path) -> dict[str, Adapter]:
    """Adapters that put something in front of the prompt or beside its keys and values."""
    strong = Strong(base, 3)
    last = strong.identity.num_hidden_layers - 1
    return {
        "virtual tokens": strong.adapter(strong.virtual_tokens(5)),
        "prefixes": strong.adapter(strong.prefixes(4)),
        "gated prefixes": strong.adapter(strong.prefixes(3, gated=True)),
        "gated prefixes after the projection": strong.adapter(strong.prefixes(3, gated=True, projected=False)),
        "virtual tokens and edits": strong.adapter(
            strong.virtual_tokens(3),
            strong.low_rank(0, "f2"),
            strong.low_rank(last, "l2"),
            strong.low_rank(0, "generated"),
        ),
        "prefixes and weights": strong.adapter(
            strong.prefixes(6), [strong.lora(module, positions="f3+l2") for module in strong.sizes]
        ),
    }
