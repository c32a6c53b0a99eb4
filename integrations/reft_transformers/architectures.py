"""Names of the parts of a decoder layer, per architecture: the one table, and a search by structure for the others.

Components, for hidden states `h` that enter a layer:

- `block_input`, and `attention_residual`, the residual input of the attention sub-layer, are `h`.
- `attention_value_output` is the input of attention's output projection, heads side by side.
- `attention_output` is what attention adds to the residual stream, so it comes after a norm inside the branch (Gemma 2,
  Gemma 3) and after dropout.
- `mlp_residual` is the residual input of the MLP: `h + attention_output`. Layers that compute attention and MLP side by
  side (GPT-NeoX with parallel residual) have none.
- `mlp_activation` is the input of the MLP's output projection, and `mlp_output` what the MLP adds.
- `block_output` is what leaves the layer: `mlp_residual + mlp_output`.

In the encoders with norms behind the additions (BERT, RoBERTa, DistilBERT) the outputs are what is added, before the
norm: `mlp_residual = norm(h + attention_output)` and `block_output = norm(mlp_residual + mlp_output)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Residual = Literal["sequential", "parallel", "post_norm"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Modules of a layer, by their names in it; empty where the architecture has none or none was found.

    Attributes:
        attention: calls transformers' attention function.
        attention_branch, mlp_branch: their outputs are added to the residual stream.
        attention_projection, mlp_projection: the output projections.
        mlp_entry: its input is `mlp_residual`; with `post_norm` its output.
        residual: how the branches join the residual stream.
    """

    attention: str
    attention_branch: str
    attention_projection: str
    mlp_entry: str
    mlp_branch: str
    mlp_projection: str
    residual: Residual = "sequential"


LLAMA = Layout("self_attn", "self_attn", "self_attn.o_proj", "post_attention_layernorm", "mlp", "mlp.down_proj")
GEMMA2 = Layout(
    "self_attn",
    "post_attention_layernorm",
    "self_attn.o_proj",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "mlp.down_proj",
)
PHI3 = Layout(
    "self_attn",
    "resid_attn_dropout",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "resid_mlp_dropout",
    "mlp.down_proj",
)
GPT2 = Layout("attn", "attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_proj")
GPT_NEOX = Layout(
    "attention",
    "post_attention_dropout",
    "attention.dense",
    "post_attention_layernorm",
    "post_mlp_dropout",
    "mlp.dense_4h_to_h",
)
BERT = Layout(
    "attention.self",
    "attention.output.dropout",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "output.dropout",
    "output.dense",
    "post_norm",
)
DISTILBERT = Layout("attention", "attention", "attention.out_lin", "sa_layer_norm", "ffn", "ffn.lin2", "post_norm")

LAYOUTS: dict[str, Layout] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "gemma3_text": GEMMA2,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": DISTILBERT,
}
"""By `model_type` of the model's text configuration."""

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn")
PROJECTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo")
DOWN_NAMES = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "lin2", "w2", "wo")
"""What `structure.search` tries in layers of an architecture that the table does not have."""
