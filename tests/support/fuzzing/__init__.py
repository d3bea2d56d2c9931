"""Fuzzing of everything that reads files: mutated files, the parsers to try them on, and children that may crash."""
