"""Benchmarks: this package beside torch, bitsandbytes and PEFT, in one run. See README.md, "Speed"."""
