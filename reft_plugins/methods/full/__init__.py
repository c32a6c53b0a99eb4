"""Full fine-tuning: all or chosen parameters of the base model."""

from reft_plugins.methods.full.method import Full

__all__ = ["Full"]
