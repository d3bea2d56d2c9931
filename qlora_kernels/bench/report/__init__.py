"""What was measured: files, tables, plots, comparisons."""
