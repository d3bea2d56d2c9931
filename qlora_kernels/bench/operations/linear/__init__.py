"""The layer's products: forward, dx, backward, and a whole training step."""
