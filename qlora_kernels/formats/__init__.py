"""Formats of quantized weights: their tensors in memory and on disk."""
