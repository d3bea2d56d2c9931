"""Benchmarks of this package beside its peers: ``qlora-kernels bench``."""
