"""Benchmarks: ``pytest benchmarks/``; see harness.py. Not installed."""
