"""What a quick run does: which tests it takes, and which kernels these run."""
