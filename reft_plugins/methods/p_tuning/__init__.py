"""P-tuning: embeddings in front of the prompt, computed by a trained encoder."""

from reft_plugins.methods.p_tuning.method import PTuning

__all__ = ["PTuning"]
