"""LLaMA-Adapter: gated attention to learned prompts in the top layers."""

from reft_plugins.methods.llama_adapter.method import LlamaAdapter

__all__ = ["LlamaAdapter"]
