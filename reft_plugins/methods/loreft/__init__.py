"""LoReFT: low-rank linear subspace ReFT."""

from reft_plugins.methods.loreft.method import LoReFT

__all__ = ["LoReFT"]
