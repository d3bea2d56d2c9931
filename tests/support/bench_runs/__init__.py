"""Small benchmarks, and what a card would say, for the tests of both."""
