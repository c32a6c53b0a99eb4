"""Adding up what adapters put in front of a prompt: virtual tokens and key/value prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reft_plugins.errors import AdapterError
from reft_plugins.program import KeyValuePrefix, Node, VirtualTokens


def scale_prompt(node: VirtualTokens | KeyValuePrefix, weight: float) -> VirtualTokens | KeyValuePrefix:
    """A gated prefix adds `gate * attention` to what the base computes, so its gate takes the weight.

    Raises:
        AdapterError: on virtual tokens and ungated prefixes, which are there or are not: no weight is defined for them.
    """
    if weight == 1:
        return node
    if isinstance(node, KeyValuePrefix) and node.gate is not None:
        return replace(node, gate=node.gate.float() * weight)
    raise AdapterError(
        f"{node}: a token is there or is not, so no weight but 1 is defined for it, not {weight:g}. "
        "Only weights of edits, weight deltas and gated prefixes can be chosen"
    )


def join_prompts(parts: Sequence[Sequence[Node]]) -> list[VirtualTokens | KeyValuePrefix]:
    """Virtual tokens of all adapters behind one another, and likewise the prefixes of each layer.

    Virtual tokens stand behind prefixes. A gated prefix has a softmax of its own, so every one stays a node of its own.

    Raises:
        AdapterError: adapters have prefixes on different layers, so that real tokens would begin behind a different
            number of pairs in each.
    """
    import torch

    tokens = [node.embeddings for part in parts for node in part if isinstance(node, VirtualTokens)]
    prefixes = [node for part in parts for node in part if isinstance(node, KeyValuePrefix)]
    ungated: dict[int, list[KeyValuePrefix]] = {}
    for prefix in prefixes:
        if prefix.gate is None:
            ungated.setdefault(prefix.layer, []).append(prefix)
    lengths = {layer: sum(len(node.keys) for node in nodes) for layer, nodes in ungated.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"layer {layer} {length}" for layer, length in sorted(lengths.items()))
        raise AdapterError(
            f"prefixes of different layers cannot be joined: real tokens begin behind the same number of pairs in "
            f"every layer, here {described}"
        )
    found: list[VirtualTokens | KeyValuePrefix] = []
    if tokens:
        found.append(VirtualTokens(torch.cat(tokens)))
    for layer, nodes in sorted(ungated.items()):
        keys, values = torch.cat([n.keys for n in nodes]), torch.cat([n.values for n in nodes])
        found.append(KeyValuePrefix(layer, keys, values))
    return found + [prefix for prefix in prefixes if prefix.gate is not None]
