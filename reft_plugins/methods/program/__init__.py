"""A program kept node by node: what imports and compositions become that no learned method describes."""

from reft_plugins.methods.program.method import ProgramMethod, adapter_of

__all__ = ["ProgramMethod", "adapter_of"]
