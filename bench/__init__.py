"""Benchmarks: this package beside torch, bitsandbytes and PEFT, in one run. See docs/benchmarks.md."""
