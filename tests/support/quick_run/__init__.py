"""Which tests a quick run takes, and that collecting them builds nothing."""
