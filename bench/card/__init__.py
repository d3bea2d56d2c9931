"""Checks of this package on a card: facts, build, tests, sanitizers, rates, the bench."""
