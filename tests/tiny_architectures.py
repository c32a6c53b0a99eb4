"""Tiny random models of every architecture in the table, and their layers' arithmetic written out by hand.

`written_out` replaces the forward pass of one layer by a few lines that call `edit(component, value)` where the
component's name says it is: what hooks do is held against that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 112, "max_position_embeddings": 128}
WIDE = {**GROUPED, "head_dim": 24}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**SMALL, "intermediate_size": 112, "max_position_embeddings": 128, "pad_token_id": 0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", WIDE),
    "mistral": ("MistralForCausalLM", {**WIDE, "sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", WIDE),
    "gemma2": ("Gemma2ForCausalLM", {**WIDE, "sliding_window": 7, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3ForCausalLM", {**WIDE, "sliding_window": 7, "query_pre_attn_scalar": 20}),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SMALL, "intermediate_size": 112, "max_position_embeddings": 128}),
    "gpt_neox_sequential": (
        "GPTNeoXForCausalLM",
        {**SMALL, "intermediate_size": 112, "max_position_embeddings": 128, "use_parallel_residual": False},
    ),
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", {**ENCODER, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 112, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
    ),
}
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = tuple(name for name in CONFIGS if name not in ENCODERS)


def tiny(name: str, attention: str | None = None, **config: Any) -> Any:
    """A model in evaluation mode whose every parameter, norms and biases too, is random and matters."""
    class_name, settings = CONFIGS[name]
    model_class: Any = getattr(transformers, class_name)
    torch.manual_seed(sum(map(ord, name)))
    settings = {**(TOKENS if name in DECODERS else {}), **settings, **config}
    implementation = attention or ("eager" if name == "gemma2" else "sdpa")
    built: Any = model_class(model_class.config_class(**settings, attn_implementation=implementation))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.2 / parameter.shape[1] ** 0.5 if parameter.shape[0] != 96 else 0.6)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return built.eval()


def layers(model: Any) -> nn.ModuleList:
    return next(m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


Edit = Callable[[str, Tensor], Tensor]


def _sequential(
    block: Any,
    h: Tensor,
    edit: Edit,
    attention: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
) -> Tensor:
    h = edit("block_input", h)
    r = edit("mlp_residual", h + edit("attention_output", attention(h)))
    return edit("block_output", r + edit("mlp_output", mlp(norm(r))))


def _llama(b: Any, h: Tensor, edit: Edit, **kw: Any) -> Tensor:
    return _sequential(
        b, h, edit, lambda x: b.self_attn(b.input_layernorm(x), **kw)[0], b.post_attention_layernorm, b.mlp
    )


def _gemma2(b: Any, h: Tensor, edit: Edit, **kw: Any) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        return b.post_attention_layernorm(b.self_attn(b.input_layernorm(x), **kw)[0])

    return _sequential(
        b, h, edit, attention, b.pre_feedforward_layernorm, lambda x: b.post_feedforward_layernorm(b.mlp(x))
    )


def _gpt2(b: Any, h: Tensor, edit: Edit, *args: Any, **kw: Any) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        return b.attn(b.ln_1(x), past_key_values=args[0], attention_mask=args[1], **kw)[0]

    return _sequential(b, h, edit, attention, b.ln_2, b.mlp)


def _gpt_neox(b: Any, h: Tensor, edit: Edit, **kw: Any) -> Tensor:
    if not b.use_parallel_residual:
        return _sequential(
            b, h, edit, lambda x: b.attention(b.input_layernorm(x), **kw)[0], b.post_attention_layernorm, b.mlp
        )
    h = edit("block_input", h)
    a = edit("attention_output", b.attention(b.input_layernorm(h), **kw)[0])
    return edit("block_output", h + a + edit("mlp_output", b.mlp(b.post_attention_layernorm(h))))


def _bert(b: Any, h: Tensor, edit: Edit, mask: Any = None, *args: Any, **kw: Any) -> Tensor:
    h = edit("block_input", h)
    own, joint = b.attention.output, b.output
    a = edit("attention_output", own.dense(b.attention.self(h, attention_mask=mask)[0]))
    r = edit("mlp_residual", own.LayerNorm(h + a))
    return edit("block_output", joint.LayerNorm(r + edit("mlp_output", joint.dense(b.intermediate(r)))))


def _distilbert(b: Any, h: Tensor, edit: Edit, mask: Any = None, **kw: Any) -> Tensor:
    h = edit("block_input", h)
    r = edit("mlp_residual", b.sa_layer_norm(h + edit("attention_output", b.attention(h, attention_mask=mask)[0])))
    return edit("block_output", b.output_layer_norm(r + edit("mlp_output", b.ffn(r))))


BY_HAND: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "llama": (_llama, "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": (_gemma2, "self_attn.o_proj", "mlp.down_proj"),
    "gemma3": (_gemma2, "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": (_gpt2, "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": (_gpt_neox, "attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox_sequential": (_gpt_neox, "attention.dense", "mlp.dense_4h_to_h"),
    "bert": (_bert, "attention.output.dense", "output.dense"),
    "roberta": (_bert, "attention.output.dense", "output.dense"),
    "distilbert": (_distilbert, "attention.out_lin", "ffn.lin2"),
}


@contextmanager
def written_out(name: str, model: Any, layer: int, edit: Edit) -> Iterator[None]:
    forward, attention, mlp = BY_HAND.get(name, BY_HAND["llama"])
    block: Any = layers(model)[layer]
    patched: list[Any] = [block]

    def projected(path: str, component: str) -> None:
        module: Any = block.get_submodule(path)
        plain = module.forward
        module.forward = lambda x: plain(edit(component, x))
        patched.append(module)

    projected(attention, "attention_value_output")
    projected(mlp, "mlp_activation")
    block.forward = lambda *args, **kw: forward(block, args[0], edit, *args[1:], **kw)
    try:
        yield
    finally:
        for module in patched:
            del module.forward
