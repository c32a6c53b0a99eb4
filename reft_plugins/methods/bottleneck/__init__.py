"""Bottleneck adapters: a small network with one hidden layer inside each decoder layer."""

from reft_plugins.methods.bottleneck.method import Bottleneck

__all__ = ["Bottleneck"]
