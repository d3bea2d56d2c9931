"""The compiled extension: loading it, what it was built for, which kernel it picks."""
