"""Between a network and the sampling loop: layout, precomputed conditions, blocks of fixed size."""
