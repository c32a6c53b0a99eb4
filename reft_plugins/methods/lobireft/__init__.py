"""LobiReFT: a low-rank bias."""

from reft_plugins.methods.lobireft.method import LobiReFT

__all__ = ["LobiReFT"]
