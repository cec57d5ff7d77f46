"""Measuring: what an op, a network and the host cost, and the search for launch configs."""
