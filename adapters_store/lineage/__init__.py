"""Where versions come from and what was made of them, as far as their manifests say and the store has it.

from adapters_store import Store
from adapters_store.lineage import lineage

for edge in lineage(Store.open(), "both:latest").edges:
    print(edge.relation, edge.source)
"""

from adapters_store.lineage.results import Edge, Export, Lineage, Node, Training
from adapters_store.lineage.tracing import lineage

__all__ = ["Edge", "Export", "Lineage", "Node", "Training", "lineage"]
