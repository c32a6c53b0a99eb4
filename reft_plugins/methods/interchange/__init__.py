"""Interchange interventions with a cached source: part of a representation becomes what another prompt had there."""

from reft_plugins.methods.interchange.method import Interchange

__all__ = ["Interchange"]
