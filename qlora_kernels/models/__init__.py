"""Whole models: which layers to quantize and to adapt, and the adapters of all layers at once."""
