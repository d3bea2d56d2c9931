"""Low-rank adapters of one layer."""
