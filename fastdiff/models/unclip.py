"""How unCLIP's decoder reads a text and an image embedding (Ramesh et al. 2022, section 2.1).

The decoder is `fastdiff.models.unet.UNet` with `context_attention="appended"`, as in GLIDE. CLIP's
image embedding is projected and added to the time embedding, and projected to further tokens before
those of the text (arXiv 2204.06125). The prior that makes an image embedding from a text is
`fastdiff.models.prior.Prior`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor, nn

from fastdiff.images import to_pil
from fastdiff.models.layers import LayerNorm, timestep_embedding
from fastdiff.models.text import EncodedPrompt


@dataclass(frozen=True, kw_only=True)
class ImageProjectionConfig:
    """The architecture of an `ImageProjection`."""

    embedding_dim: int  # width of CLIP's embeddings and of the text's tokens
    image_tokens: int  # tokens that an image embedding becomes
    context_dim: int  # width of the tokens that the decoder reads
    added_dim: int  # width of the decoder's time embedding

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "image_tokens", "context_dim", "added_dim"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"ImageProjectionConfig: {name} must be positive, got {value}")

    @property
    def num_blocks(self) -> int:
        return 1


class ImageProjection(nn.Module):
    """Turn CLIP's embeddings and the text's tokens into what the decoder reads."""

    def __init__(self, config: ImageProjectionConfig) -> None:
        super().__init__()
        self.config = config
        width, context, added = config.embedding_dim, config.context_dim, config.added_dim
        self.null_embed = nn.Parameter(torch.zeros(width))  # in place of an image, for guidance
        self.text_added = nn.Linear(width, added)
        self.image_added = nn.Linear(width, added)
        self.image_tokens = nn.Linear(width, config.image_tokens * context)
        self.text_tokens = nn.Linear(width, context)
        self.norm = LayerNorm(context)

    def forward(self, image: Tensor | None, text: EncodedPrompt) -> EncodedPrompt:
        """The decoder's context and added vector.

        Args:
            image: (N, embedding_dim), CLIP's embeddings of images; None: no image.
            text: its tokens (N, T, embedding_dim) and CLIP's embedding (N, embedding_dim).

        Returns:
            tokens (N, image_tokens + T, context_dim), those of the image first; pooled (N,
            added_dim); and a mask (N, image_tokens + T) if the text has one.
        """
        config, pooled = self.config, text.pooled
        assert pooled is not None, "CLIP's text encoders with projection return an embedding"
        if image is None:
            image = self.null_embed.expand(len(pooled), -1)
        added = self.image_added(image) + self.text_added(pooled)
        first = self.image_tokens(image).unflatten(1, (config.context_dim, config.image_tokens))
        rest, _ = self.norm(self.text_tokens(text.tokens))
        tokens = torch.cat([first.mT, rest], dim=1)  # (N, image_tokens + T, context_dim)
        mask = text.mask
        if mask is not None:
            mask = nn.functional.pad(mask, (config.image_tokens, 0), value=True)
        return EncodedPrompt(tokens, added, mask)


@dataclass(frozen=True, kw_only=True)
class ImageNoiseConfig:
    """The architecture of an `ImageNoise`."""

    embedding_dim: int  # width of CLIP's image embeddings

    def __post_init__(self) -> None:
        if self.embedding_dim <= 0:
            raise ValueError(
                f"ImageNoiseConfig: embedding_dim must be positive, got {self.embedding_dim}"
            )

    @property
    def num_blocks(self) -> int:
        return 1


class ImageNoise(nn.Module):
    """Add noise to an image embedding, and say how much (Stable Diffusion 2.1 unCLIP).

    The noise is added where CLIP's embeddings have mean 0 and variance 1 (`mean`, `std`).
    """

    def __init__(self, config: ImageNoiseConfig) -> None:
        super().__init__()
        self.config = config
        # statistics of CLIP's image embeddings, which are measured and not trained
        self.mean = nn.Parameter(torch.zeros(1, config.embedding_dim), requires_grad=False)
        self.std = nn.Parameter(torch.ones(1, config.embedding_dim), requires_grad=False)

    def forward(self, image: Tensor, noise: Tensor, alpha: float, sigma: float, t: int) -> Tensor:
        """The vector that the denoiser adds to its time embedding.

        Args:
            image, noise: (N, embedding_dim).
            alpha, sigma: shares of the image and of the noise.
            t: their timestep.

        Returns:
            (N, 2 * embedding_dim): the noised embedding, and the embedding of t.
        """
        normal = (image - self.mean) / self.std
        noised = (alpha * normal + sigma * noise) * self.std + self.mean
        steps = torch.full((len(image),), float(t), device=image.device)
        level = timestep_embedding(steps, self.config.embedding_dim, "openai").to(noised)
        return torch.cat([noised, level], dim=1)


@dataclass(frozen=True, kw_only=True)
class CLIPTextEncoder:
    """CLIP's text encoder as unCLIP reads it: all tokens, their mask, and the text's embedding; a
    `fastdiff.models.text.JointEncoder`."""

    model: nn.Module
    """transformers' CLIPTextModelWithProjection."""
    tokenizer: Any | None = None
    """transformers' CLIPTokenizer; None if the files contain weights but no vocabulary."""

    @property
    def facts(self) -> list[Any]:
        """What the weights' shapes do not determine, for the hash of a model."""
        config: Any = self.model.config
        names = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")
        return [*(getattr(config, name) for name in names), "unclip"]

    def check_prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt's tokens, with those that begin and end it.

        Raises:
            ValueError: it is too long, or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "the text encoder of unCLIP has no tokenizer, only weights; give the folder of a "
                "CLIP tokenizer as tokenizer= (--tokenizer FOLDER)"
            )
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        most: int = self.model.config.max_position_embeddings  # type: ignore[union-attr,assignment]
        if len(ids) > most - 2:
            raise ValueError(
                f"a prompt of this model may have at most {most - 2} tokens, got {len(ids):,}; "
                "shorten it"
            )
        return [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]

    @torch.no_grad()
    def encode(self, prompt: str) -> EncodedPrompt:
        """Encode one prompt; an empty one is what guidance leads away from.

        Returns:
            tokens (1, T, D), padding included; pooled (1, D'), CLIP's text embedding; mask (1, T).

        Raises:
            ValueError: as for `check_prompt`.
        """
        ids = self.check_prompt(prompt)
        assert self.tokenizer is not None
        length: int = self.model.config.max_position_embeddings  # type: ignore[union-attr,assignment]
        padded = ids + [self.tokenizer.pad_token_id] * (length - len(ids))
        device = next(self.model.parameters()).device
        output = self.model(torch.tensor([padded], device=device))
        mask = torch.arange(length, device=device)[None] < len(ids)
        return EncodedPrompt(output.last_hidden_state, output.text_embeds, mask)


@dataclass(frozen=True, kw_only=True)
class CLIPImageEncoder:
    """CLIP's image encoder, and how it sees a picture."""

    model: nn.Module
    """transformers' CLIPVisionModelWithProjection."""
    size: int
    """What the shorter side of a picture is resized to, by a bicubic filter."""
    crop: int
    """Side of the square at its centre that is encoded; at most `size`."""
    mean: tuple[float, float, float]
    """What is subtracted from the channels in [0, 1]."""
    std: tuple[float, float, float]
    """What they are divided by then."""

    @property
    def facts(self) -> list[Any]:
        """What the weights' shapes do not determine, for the hash of a model."""
        config: Any = self.model.config
        names = ("num_attention_heads", "hidden_act", "layer_norm_eps", "patch_size")
        seen = [self.size, self.crop, list(self.mean), list(self.std)]
        return [*(getattr(config, name) for name in names), *seen]

    def seen(self, image: Tensor) -> Tensor:
        """What the network reads of a picture, rounded to 8 bits as CLIPImageProcessor's.

        image: (3, H, W) in [-1, 1]. Returns (3, crop, crop), fp32, on the CPU.
        """
        picture = to_pil(image)
        short = min(picture.size)
        width, height = (int(self.size * side / short) for side in picture.size)
        picture = picture.resize((width, height), Resampling.BICUBIC)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        picture = picture.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """CLIP's embedding of a picture, not normalised. image: (3, H, W) in [-1, 1].

        Returns (1, D).
        """
        weight = next(self.model.parameters())
        embedding: Tensor = self.model(self.seen(image)[None].to(weight)).image_embeds
        return embedding
