"""ConsReFT: a subspace is set to a constant."""

from reft_plugins.methods.consreft.method import ConsReFT

__all__ = ["ConsReFT"]
