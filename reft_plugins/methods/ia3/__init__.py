"""IA3: learned scales of keys, values and the inside of the feed-forward network, trained by PEFT."""

from reft_plugins.methods.ia3.method import IA3

__all__ = ["IA3"]
