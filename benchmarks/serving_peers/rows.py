"""What is measured, on which engine, and what it is held to."""

from __future__ import annotations

from dataclasses import dataclass

BASE, IDLE, PROMPT, EVERYWHERE, LORA, OUR_LORA = "base", "idle", "f7+l7", "all", "lora", "our lora"

TITLES = {
    BASE: "base: vLLM without plugin, without LoRA",
    IDLE: "plugin installed, idle",
    PROMPT: "ReFT f7+l7, all layers, rank 4",
    EVERYWHERE: "ReFT all positions, all layers, rank 4",
    LORA: "vLLM's LoRA, all linear layers, rank 8",
    OUR_LORA: "the same LoRA, plugin's compiled CPU path",
}

LORA_FACTOR = 2.2


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `count` distinct adapters of a kind in one batch, on the engine `engine`."""

    kind: str
    count: int
    engine: str


@dataclass(frozen=True, slots=True)
class Target:
    """A row's speed divided by another's must reach `least`."""

    row: Row
    reference: Row
    least: float


def rows(device: str, counts: list[int], everywhere: list[int]) -> list[Row]:
    """All lines for a device, in the order they are measured."""
    found = [Row(BASE, 0, "base"), Row(IDLE, 0, "reft")]
    found += [Row(PROMPT, count, "reft") for count in counts]
    found += [Row(EVERYWHERE, count, "reft") for count in everywhere]
    found += [Row(LORA, count, "lora") for count in counts]
    if device == "cpu":
        found += [Row(OUR_LORA, count, "our lora") for count in counts]
    return found


def targets(device: str, found: list[Row]) -> list[Target]:
    """What the project promises of these rows."""
    by = {(row.kind, row.count): row for row in found}
    base = by[BASE, 0]
    promised = [Target(by[IDLE, 0], base, 0.99)] if (IDLE, 0) in by else []
    for row in found:
        one = by.get((PROMPT, 1))
        if row.kind == PROMPT and (row.count == 1 or (device == "cuda" and row.count != 256)):
            promised.append(Target(row, base, 0.97))
        if row.kind == PROMPT and row.count == 256 and one is not None:
            promised.append(Target(row, one, 0.95))
        if row.kind == EVERYWHERE:
            promised.append(Target(row, base, 0.90))
        lora = by.get((LORA, row.count))
        if row.kind in (PROMPT, EVERYWHERE) and lora is not None and (device == "cpu" or row.count == 512):
            promised.append(Target(row, lora, LORA_FACTOR))
    return promised


def every_round(found: list[Row]) -> list[Row]:
    """The rows that are held to per cents of another: they are measured in every round."""
    ends = {
        kind: {function([row.count for row in found if row.kind == kind], default=0) for function in (min, max)} | {256}
        for kind in (PROMPT, EVERYWHERE)
    }
    return [row for row in found if row.kind in (BASE, IDLE) or row.count in ends.get(row.kind, ())]
