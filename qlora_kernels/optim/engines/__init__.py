"""Engines: what takes an optimizer's step on a device."""
