"""Diffusion models with fused kernels: a complete, readable, proven system."""

from __future__ import annotations

__version__ = "0.1.0"
