"""Prefix tuning and P-Tuning v2: learned keys and values in front of every layer's own."""

from reft_plugins.methods.prefix_tuning.method import PrefixTuning

__all__ = ["PrefixTuning"]
