"""Steering vectors: a constant added to hidden representations, by gradient or by difference of means."""

from reft_plugins.methods.steering.method import Steering

__all__ = ["Steering"]
