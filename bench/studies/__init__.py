"""Studies: trainings that are compared with each other."""
