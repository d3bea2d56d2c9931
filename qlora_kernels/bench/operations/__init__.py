"""What is measured: a module for each operation, whose ``cases`` name the contenders, this package first."""
