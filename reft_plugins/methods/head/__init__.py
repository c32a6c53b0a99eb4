"""Training the head alone, on representations the base model computes as it always did."""

from reft_plugins.methods.head.method import Head

__all__ = ["Head"]
