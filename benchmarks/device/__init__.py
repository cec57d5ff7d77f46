"""The measurements and checks that need a GPU: `python -m benchmarks.device`."""
