"""Benchmarks: run them from the checkout as `python -m benchmarks.NAME`."""
