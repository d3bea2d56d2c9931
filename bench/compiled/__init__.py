"""What the compiled kernels are made of, read without a card, and the times that follow from it."""
