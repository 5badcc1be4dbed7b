"""Measurements, side by side in one run. ``python -m benchmarks.run`` makes every table of the README and docs/."""
