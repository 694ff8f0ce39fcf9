"""Benchmarks: what a call costs here against what one would otherwise write. `python -m vkernels bench`."""
