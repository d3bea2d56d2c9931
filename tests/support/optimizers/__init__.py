"""Small runs of the optimizers, and a reference for their steps."""
