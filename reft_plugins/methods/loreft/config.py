"""Settings of LoReFT."""

from __future__ import annotations

from reft_plugins.methods.interventions import LowRankConfig


class LoReFTConfig(LowRankConfig):
    """Those of every low-rank intervention."""
