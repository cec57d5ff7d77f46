"""Small blocks like those of well-known repositories, written from their published structure."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """OpenAI's: statistics in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ResnetBlock(nn.Module):
    """CompVis, autoencoders."""

    def __init__(self, c: int, out: int, temb: int = 0) -> None:
        super().__init__()
        self.in_channels, self.out_channels = c, out
        self.norm1 = nn.GroupNorm(4, c, eps=1e-6)
        self.conv1 = nn.Conv2d(c, out, 3, padding=1)
        if temb:
            self.temb_proj = nn.Linear(temb, out)
        self.norm2 = nn.GroupNorm(4, out, eps=1e-6)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if c != out:
            self.nin_shortcut = nn.Conv2d(c, out, 1)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return (self.nin_shortcut(x) if self.in_channels != self.out_channels else x) + h


class AttnBlock(nn.Module):
    """CompVis, autoencoders."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, c, eps=1e-6)
        self.q, self.k, self.v = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        w = torch.softmax(q.mT @ k / math.sqrt(x.shape[1]), dim=2)
        return x + self.proj_out((v @ w.mT).reshape(x.shape))


class ResBlock(nn.Module):
    """guided-diffusion."""

    def __init__(self, c: int, out: int, film: bool, updown: bool = False) -> None:
        super().__init__()
        self.use_scale_shift_norm, self.updown = film, updown
        self.in_layers = nn.Sequential(
            GroupNorm32(4, c), nn.SiLU(), nn.Conv2d(c, out, 3, padding=1)
        )
        self.h_upd = self.x_upd = nn.Upsample(scale_factor=2) if updown else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(12, out * (2 if film else 1)))
        last = nn.Conv2d(out, out, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)  # as published: a probe with these weights would see nothing
        self.out_layers = nn.Sequential(GroupNorm32(4, out), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if c == out else nn.Conv2d(c, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            rest, conv = self.in_layers[:-1], self.in_layers[-1]
            h = conv(self.h_upd(rest(x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        out = self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = out.chunk(2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + out)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """guided-diffusion: both orders of the packed rows."""

    def __init__(self, n_heads: int, legacy: bool) -> None:
        super().__init__()
        self.n_heads, self.legacy = n_heads, legacy

    def forward(self, qkv: Tensor) -> Tensor:
        n, width, length = qkv.shape
        d = width // (3 * self.n_heads)
        if self.legacy:
            q, k, v = qkv.reshape(n * self.n_heads, 3 * d, length).split(d, dim=1)
        else:
            q, k, v = (p.reshape(n * self.n_heads, d, length) for p in qkv.chunk(3, dim=1))
        w = torch.softmax(q.mT @ k / math.sqrt(d), dim=-1)
        return (v @ w.mT).reshape(n, -1, length)


class AttentionBlock(nn.Module):
    """guided-diffusion."""

    def __init__(self, c: int, heads: int, legacy: bool) -> None:
        super().__init__()
        self.norm = GroupNorm32(4, c)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.attention = QKVAttention(heads, legacy)
        self.proj_out = nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return (flat + self.proj_out(self.attention(self.qkv(self.norm(flat))))).reshape(x.shape)


class CrossAttention(nn.Module):
    """latent-diffusion."""

    def __init__(self, dim: int, context: int | None, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context or dim, dim, bias=False)
        self.to_v = nn.Linear(context or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Any = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        scores = torch.einsum("nhid,nhjd->nhij", q, k) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.finfo(scores.dtype).max)
        return self.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """latent-diffusion."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class BasicTransformerBlock(nn.Module):
    """latent-diffusion."""

    def __init__(self, dim: int, context: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, 2)
        self.ff = nn.Sequential(GEGLU(dim, 2 * dim), nn.Dropout(0.0), nn.Linear(2 * dim, dim))
        self.attn2 = CrossAttention(dim, context, 2)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.checkpoint = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._forward(x, context)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class Block(nn.Module):
    """lucidrains, denoising-diffusion-pytorch."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 3, padding=1)
        self.norm = nn.GroupNorm(4, out)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, scale_shift: Any = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.act(x)


class Impostor(Block):
    """A Block's layers, another function."""

    def forward(self, x: Tensor, scale_shift: Any = None) -> Tensor:
        return self.act(self.norm(self.proj(x))) * 1.5


class ImprovedSiLU(nn.Module):
    """improved-diffusion's own, for old releases of PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class ImprovedQKVAttention(nn.Module):
    """improved-diffusion: the heads are in the batch."""

    def forward(self, qkv: Tensor) -> Tensor:
        c = qkv.shape[1] // 3
        q, k, v = torch.split(qkv, c, dim=1)
        scale = 1 / math.sqrt(math.sqrt(c))
        w = torch.softmax((q * scale).mT @ (k * scale), dim=-1)
        return v @ w.mT


class ImprovedAttentionBlock(AttentionBlock):
    """improved-diffusion's block that contains it."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__(c, heads, legacy=True)
        self.num_heads, self.attention = heads, ImprovedQKVAttention()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        h = self.attention(qkv.reshape(len(x) * self.num_heads, -1, qkv.shape[2]))
        return (flat + self.proj_out(h.reshape(flat.shape))).reshape(x.shape)


class ImprovedResBlock(ResBlock):
    """improved-diffusion's, which is guided-diffusion's with another SiLU."""

    def __init__(self, c: int, out: int, film: bool) -> None:
        super().__init__(c, out, film)
        self.in_layers[1] = self.out_layers[1] = ImprovedSiLU()


class GlideAttention(QKVAttention):
    """GLIDE: keys and values of a text in addition to those of the image, and a mask."""

    def forward(self, qkv: Tensor, encoder_kv: Any = None, mask: Any = None) -> Tensor:
        n, width, length = qkv.shape
        d = width // (3 * self.n_heads)
        q, k, v = qkv.reshape(n * self.n_heads, 3 * d, length).split(d, dim=1)
        if encoder_kv is not None:
            ek, ev = encoder_kv.reshape(n * self.n_heads, 2 * d, -1).split(d, dim=1)
            k, v = torch.cat([ek, k], dim=-1), torch.cat([ev, v], dim=-1)
        scores = q.mT @ k / math.sqrt(d)
        if mask is not None:
            scores = scores + mask
        return (v @ scores.softmax(-1).mT).reshape(n, -1, length)


class GlideBlock(AttentionBlock):
    """GLIDE: the block that contains it."""

    def __init__(self, c: int, heads: int, text: int) -> None:
        super().__init__(c, heads, legacy=True)
        self.attention = GlideAttention(heads, legacy=True)
        self.encoder_kv = nn.Conv1d(text, 2 * c, 1)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        h = self.attention(qkv) if text is None else self.attention(qkv, self.encoder_kv(text))
        return (flat + self.proj_out(h)).reshape(x.shape)


class RMSNorm(nn.Module):
    """lucidrains, from 1.9 on."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class RMSBlock(Block):
    """lucidrains, from 1.9 on."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out)
        self.norm = RMSNorm(out)  # type: ignore[assignment]


class RMSResnetBlock(nn.Module):
    """lucidrains."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(12, 2 * dim))
        self.block1, self.block2 = RMSBlock(dim, dim), RMSBlock(dim, dim)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        film = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, film)) + x


class LinearAttention(nn.Module):
    """lucidrains."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, RMSNorm(dim)
        self.to_qkv, self.to_out = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = (
            part.reshape(n, self.heads, -1, h * w)
            for part in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        context = k.softmax(-1) @ v.mT
        return self.to_out((context.mT @ q.softmax(-2)).reshape(n, c, h, w)) + x
