"""Modules whose weights are 8-bit codes."""
