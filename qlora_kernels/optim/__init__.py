"""Paged optimizers: states in memory that the device pages in as a step needs them."""

from .algorithms import PagedAdamW, PagedLion

__all__ = ["PagedAdamW", "PagedLion"]
