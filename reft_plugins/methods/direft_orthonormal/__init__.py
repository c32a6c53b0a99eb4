"""DiReFT as pyreft computes it: with orthonormal rows."""

from reft_plugins.methods.direft_orthonormal.method import OrthonormalDiReFT

__all__ = ["OrthonormalDiReFT"]
