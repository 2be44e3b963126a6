"""Benchmarks: what `deltal bench` runs. Each prints ratios, both sides taken in turn in one run."""
