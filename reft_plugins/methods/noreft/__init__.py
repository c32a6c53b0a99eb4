"""NoReFT: LoReFT without orthonormal rows."""

from reft_plugins.methods.noreft.method import NoReFT

__all__ = ["NoReFT"]
