"""Text encoders: which numbers of a CLIP text transformer a denoiser was trained on.

The transformers themselves are Hugging Face's (`transformers`, an optional extra); nothing here
imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text transformer, its tokenizer, and what of its output conditions the U-Net."""

    model: nn.Module
    """transformers' CLIPTextModel or CLIPTextModelWithProjection."""
    tokenizer: Any | None = None
    """transformers' CLIPTokenizer; None where a file holds weights and no vocabulary."""
    skip: int = 0
    """Layers left out at the end: 0 takes the last (Stable Diffusion 1), 1 the one before (XL)."""
    final_norm: bool = True
    """Whether the final LayerNorm follows; XL leaves it out."""
    pooled: bool = False
    """Whether its projected end-of-text vector conditions the U-Net too (XL's second encoder)."""
