"""bitsandbytes' 4-bit layers, and models that have them."""
