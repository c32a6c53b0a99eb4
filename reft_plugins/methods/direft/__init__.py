"""DiReFT as its paper defines it: direct low-rank ReFT without orthonormality."""

from reft_plugins.methods.direft.method import DiReFT

__all__ = ["DiReFT"]
