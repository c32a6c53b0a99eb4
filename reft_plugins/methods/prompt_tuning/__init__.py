"""Prompt tuning: learned embeddings in front of the prompt."""

from reft_plugins.methods.prompt_tuning.method import PromptTuning

__all__ = ["PromptTuning"]
