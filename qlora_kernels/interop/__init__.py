"""Other libraries' models and files."""
