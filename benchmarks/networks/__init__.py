"""Benchmarks of whole networks, images and checkpoints: time, memory, the share of each op."""
