"""Benchmarks: the cost of ops, of networks and of the host, and the search for launch configs."""
