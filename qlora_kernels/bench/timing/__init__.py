"""How calls are timed, and on what machine."""
