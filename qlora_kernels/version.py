"""The version. The build reads BASE from here, without importing anything."""

BASE = "0.1.0"
