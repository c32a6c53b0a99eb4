"""Classifying texts: models with a head, heads beside adapters, pooled features and a regression on them."""
