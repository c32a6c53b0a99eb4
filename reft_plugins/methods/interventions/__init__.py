"""What the methods that edit hidden representations have in common; not a method itself."""

from reft_plugins.methods.interventions.config import InterventionConfig, LowRankConfig, SourceConfig
from reft_plugins.methods.interventions.method import InterventionMethod
from reft_plugins.methods.interventions.units import UnitTensors

__all__ = ["InterventionConfig", "InterventionMethod", "LowRankConfig", "SourceConfig", "UnitTensors"]
