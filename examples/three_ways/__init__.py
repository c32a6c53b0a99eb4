"""Frozen features and a classifier, the head alone, or all layers: three ways to use one pretrained encoder."""
