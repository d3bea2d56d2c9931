"""What commands share on a terminal: progress bars, signals, quiet libraries, busy cores."""
