"""Whole networks, images and checkpoints: time, memory, what each op takes of them."""
