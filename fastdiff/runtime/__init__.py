"""The layer between networks and sampling: layout, precomputed conditions, blocks, the engine."""
