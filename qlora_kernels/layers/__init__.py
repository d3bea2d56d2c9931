"""Layers on 4-bit weights: the differentiable product, QLinear, its adapters, merging, state dicts."""
