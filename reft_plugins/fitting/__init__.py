"""Changes of linear modules: those that are exactly what a node does, and those fitted to it."""
