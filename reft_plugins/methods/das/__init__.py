"""Distributed alignment search: a rotation learned so that exchanging part of it has the effect asked for."""

from reft_plugins.methods.das.method import DAS

__all__ = ["DAS"]
