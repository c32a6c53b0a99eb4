"""LLaMA-Adapter as a method: training and lowering."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from reft_plugins.errors import AdapterError
from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, MethodConfig, Trainable
from reft_plugins.methods._tensor_names import layers_of
from reft_plugins.program import KeyValuePrefix, Program


class LlamaAdapterConfig(MethodConfig):
    """A prompt of `num_virtual_tokens` rows in each of the last `top_layers` layers, by default in all.

    The gate is one number per layer, or with `gate_per_head` one per attention head, as in the authors' code. With
    `projected=False` what the prompt contributes skips the attention's output projection, as in PEFT's form for GPT-2.
    """

    num_virtual_tokens: int = Field(default=10, ge=1)
    top_layers: int | None = Field(default=None, ge=1)
    gate_per_head: bool = False
    projected: bool = True


class LlamaAdapter(Method[LlamaAdapterConfig]):
    """`softmax(q K^T / sqrt(d)) V + g softmax(q P_k^T / sqrt(d)) P_v` (Zhang et al. 2023, arXiv:2303.16199 eq. 6-8).

    `P_k`, `P_v` are the base's key and value projections of a learned prompt, without rotary embedding; the gate `g`
    begins at zero, so that training begins at the base model, and moves first: until it does, no gradient reaches the
    prompt. It is used as it is, without the tanh of the authors' code, as in PEFT.

    It is trained by running the program. PEFT's class knows three types of model, keeps the prompt in the base's
    precision, and takes heads to be `hidden / heads` wide; where it applies, it computes the same, except that it adds
    the bias of an output projection that has one a second time.

    Tensors, for each layer: `layers.<layer>.prompt` `[n, hidden]` (what was learned, not needed to run),
    `.keys` and `.values` `[n, kv_heads, head_dim]`, `.gate` `[1]` or `[heads]`.
    """

    name = "llama_adapter"
    config = LlamaAdapterConfig
    learning_rate = 9e-3
    """What the authors use for LLaMA-7B."""

    def attach(self, model: nn.Module, config: LlamaAdapterConfig, base: BaseModelIdentity) -> Trainable:
        """Prompts and gates whose keys and values the frozen base computes.

        Raises:
            AdapterError: more layers than there are, or an attention whose projections are not understood.
        """
        from reft_plugins.methods.llama_adapter.module import LlamaAdapterParameters
        from reft_plugins.training.attach import ProgramTrainable

        count = base.num_hidden_layers if config.top_layers is None else config.top_layers
        if count > base.num_hidden_layers:
            raise AdapterError(f"top_layers {count}: the base model has {base.num_hidden_layers} layers")
        learned = LlamaAdapterParameters(
            model,
            range(base.num_hidden_layers - count, base.num_hidden_layers),
            rows=config.num_virtual_tokens,
            gate_per_head=config.gate_per_head,
        )
        return ProgramTrainable(self, model, config, base, learned)

    def lower(self, config: LlamaAdapterConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One gated `KeyValuePrefix` per layer."""
        return Program(
            tuple(
                KeyValuePrefix(
                    layer,
                    keys=tensors[f"layers.{layer}.keys"],
                    values=tensors[f"layers.{layer}.values"],
                    gate=tensors[f"layers.{layer}.gate"],
                    projected=config.projected,
                )
                for layer in layers_of(tensors, "prompt", "keys", "values", "gate")
            )
        )
