"""How the nodes of a program are written down beside their tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from reft_plugins.methods import MethodConfig
from reft_plugins.positions import Positions

PositionsSpec = Annotated[str, AfterValidator(lambda spec: str(Positions.parse(spec)))]


class EditRecord(MethodConfig):
    """What an `Edit` has besides tensors."""

    kind: Literal["edit"] = "edit"
    layer: int = Field(ge=0)
    component: str
    positions: PositionsSpec
    activation: str = "identity"
    reads: str | None = None
    simultaneous: bool = False


class WeightDeltaRecord(MethodConfig):
    """What a `WeightDelta` has besides tensors."""

    kind: Literal["weight_delta"] = "weight_delta"
    module: str
    scaling: float = Field(default=1.0, allow_inf_nan=False)
    positions: PositionsSpec = "all"


class VirtualTokensRecord(MethodConfig):
    """`VirtualTokens` are tensors only."""

    kind: Literal["virtual_tokens"] = "virtual_tokens"


class KeyValuePrefixRecord(MethodConfig):
    """What a `KeyValuePrefix` has besides tensors."""

    kind: Literal["key_value_prefix"] = "key_value_prefix"
    layer: int = Field(ge=0)
    projected: bool = True


NodeRecord = EditRecord | WeightDeltaRecord | VirtualTokensRecord | KeyValuePrefixRecord


class ProgramConfig(MethodConfig):
    """The nodes in order; tensors of node `i` are named `<i>.<field>`."""

    nodes: tuple[Annotated[NodeRecord, Field(discriminator="kind")], ...] = Field(min_length=1)
