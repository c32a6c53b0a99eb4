"""Composition of adapters learned apart: stacking, linear combination, scaling, negation, and how far they overlap."""

from reft_plugins.compose.combine import compose, learned_program, negate, same_base, scale
from reft_plugins.compose.overlap import Overlap, overlap

__all__ = ["Overlap", "compose", "learned_program", "negate", "overlap", "same_base", "scale"]
