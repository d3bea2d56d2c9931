"""What runs on the host alone: a call's cost, states in a file."""
