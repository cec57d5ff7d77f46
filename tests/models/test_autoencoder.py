"""Closed forms of the two regularisations, tiled decoding, gradients and errors."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Codebook,
    Posterior,
    Quantized,
)
from fastdiff.models.tiling import tile_starts

SMALL = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4}
KL = AutoencoderConfig(image_channels=1, latent_channels=2, **SMALL)
VQ = AutoencoderConfig(
    regularization="vq", image_channels=1, latent_channels=2, codebook_size=16, **SMALL
)


def build(config: AutoencoderConfig) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("config", [KL, VQ], ids=["kl", "vq"])
def test_gradients_reach_every_parameter_with_and_without_checkpointing(
    config: AutoencoderConfig,
) -> None:
    model, x, noise = build(config), randn(2, 1, 8, 8), randn(2, 2, 4, 4, seed=2)
    gradients, calls = [], []
    for chain in (model.encoder, model.decoder):
        chain.blocks[0].register_forward_pre_hook(lambda module, _: calls.append(module))
    for checkpointing in (False, True):
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = checkpointing
        model.zero_grad()
        image, latent = model(x, noise)
        loss = latent.loss() if isinstance(latent, Quantized) else 1e-3 * latent.kl().mean()
        ((image - x).abs().mean() + loss).backward()
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters()})
    assert len(calls) == 2 + 4  # with checkpointing once more in the backward pass
    assert not [key for key, gradient in gradients[0].items() if not gradient.any()]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-12, atol=1e-15)


def test_posterior_is_the_gaussian_it_says() -> None:
    mean, logvar, noise = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=2), randn(3, 2, 4, 4, seed=3)
    posterior = Posterior(mean, logvar)
    normal = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected.sum((1, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(posterior.sample(noise), mean + normal.stddev * noise)
    assert posterior.mode() is mean


@torch.no_grad()
def test_log_variance_is_kept_between_minus_30_and_20() -> None:
    """The limits of every CompVis autoencoder (their `DiagonalGaussianDistribution`)."""
    model = build(KL)
    model.quant_conv.weight[2:] = 0
    for bias, expected in ((-31.0, -30.0), (-29.0, -29.0), (19.0, 19.0), (21.0, 20.0)):
        model.quant_conv.bias[2:] = bias
        assert (model.encode(randn(1, 1, 8, 8)).logvar == expected).all()


@pytest.mark.parametrize(("size", "tile", "overlap"), [(19, 4, 1), (23, 8, 2), (100, 16, 5)])
def test_neighbouring_tiles_share_the_overlap_or_more(size: int, tile: int, overlap: int) -> None:
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile == size
    assert all(a + tile - b >= overlap for a, b in pairwise(starts))


def test_codebook_picks_the_nearest_code_and_states_both_losses() -> None:
    codebook = Codebook(5, 3).double()
    codebook.CHUNK = 7  # several chunks, the last one short
    nn.init.normal_(codebook.weight)
    z = randn(2, 3, 4, 5).requires_grad_()
    q = codebook(z)

    vectors = z.detach().permute(0, 2, 3, 1)  # (N, h, w, D)
    distances = (vectors[..., None, :] - codebook.weight.detach()).square().sum(-1)
    assert torch.equal(q.indices, distances.argmin(-1))
    torch.testing.assert_close(q.z_q, codebook.weight[q.indices].permute(0, 3, 1, 2))
    distance = distances.min(-1).values.mean() / 3
    torch.testing.assert_close(q.codebook_loss, distance)
    torch.testing.assert_close(q.commitment_loss, distance)

    # straight-through: the gradient of what follows reaches z unchanged, and never the codes
    weights = randn(2, 3, 4, 5, seed=2)
    dz, dcodes = torch.autograd.grad(
        (q.z_q * weights).sum(), [z, codebook.weight], allow_unused=True
    )
    assert torch.equal(dz, weights)
    assert dcodes is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_nearest_code_is_found_in_every_precision(dtype: torch.dtype) -> None:
    """New codes lie within 1 / size of 0: half precision cannot tell their distances apart."""
    torch.manual_seed(0)
    codebook = Codebook(512, 4).to(dtype)
    vectors = (1e-3 * torch.randn(1000, 4)).to(dtype)
    exact = (vectors.double()[:, None] - codebook.weight.double()).square().sum(-1)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = codebook.nearest(vectors)
        excess = exact.gather(1, found[:, None])[:, 0] / exact.min(1).values
        assert excess.max() < 1 + 1e-4


@pytest.mark.parametrize(
    ("order", "on_codes", "on_latents"), [("paper", 1, 0.25), ("legacy", 0.25, 1)]
)
def test_beta_weighs_the_term_that_its_order_says(
    order: Any, on_codes: float, on_latents: float
) -> None:
    codebook = Codebook(1, 2).double()
    nn.init.zeros_(codebook.weight)
    z = randn(1, 2, 1, 1).requires_grad_()
    codebook(z).loss(0.25, order).backward()
    # one vector of two numbers: d/dz mean(z^2) = z
    torch.testing.assert_close(z.grad, on_latents * z)
    torch.testing.assert_close(codebook.weight.grad, -on_codes * z.flatten()[None])


@pytest.mark.parametrize(
    ("indices", "usage", "perplexity"),
    [([0, 1, 2, 3], 1.0, 4.0), ([2, 2, 2, 2], 0.25, 1.0), ([0, 0, 1, 1], 0.5, 2.0)],
)
def test_usage_and_perplexity(indices: list[int], usage: float, perplexity: float) -> None:
    zero = torch.zeros(())
    q = Quantized(zero, zero, torch.tensor(indices).view(1, 2, 2), zero, zero, codebook_size=4)
    assert q.usage().item() == usage
    assert math.isclose(q.perplexity().item(), perplexity, rel_tol=1e-6)


@torch.no_grad()
def test_latents_of_both_kinds() -> None:
    x, noise = randn(2, 1, 8, 8), randn(2, 2, 4, 4, seed=2)
    kl, vq = build(KL), build(VQ)
    posterior, quantized = kl.encode(x), vq.encode(x)
    assert isinstance(posterior, Posterior)
    assert isinstance(quantized, Quantized)
    assert torch.equal(kl.encode_latent(x), posterior.mean)
    assert torch.equal(kl.encode_latent(x, noise), posterior.sample(noise))
    assert torch.equal(vq.encode_latent(x), quantized.z)
    torch.testing.assert_close(vq.decode(quantized.z), vq.decode(quantized.z_q, quantize=False))


@torch.no_grad()
def test_one_tile_is_plain_decoding() -> None:
    model, z = build(KL), randn(2, 2, 6, 5)
    assert torch.equal(model.decode_tiled(z, tile=6, overlap=2), model.decode(z))


@pytest.mark.parametrize(("tile", "overlap"), [(4, 1), (4, 0), (5, 4), (16, 3)])
@torch.no_grad()
def test_tiles_blend_without_seams_and_bound_the_memory(
    monkeypatch: pytest.MonkeyPatch, tile: int, overlap: int
) -> None:
    """With a decoder that treats every pixel alike, tiling must change nothing."""
    model, z = build(KL), randn(2, 2, 19, 7)
    sides = []

    def decode(part: Tensor) -> Tensor:
        sides.append(max(part.shape[2:]))
        return F.interpolate(part[:, :1], scale_factor=2.0, mode="nearest")

    monkeypatch.setattr(model, "decode", decode)
    torch.testing.assert_close(
        model.decode_tiled(z, tile, overlap), decode(z), rtol=1e-12, atol=1e-12
    )
    assert max(sides[:-1]) <= tile


@torch.no_grad()
def test_blending_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles of 4 in 6 latent pixels share 2, that is 4 image pixels: 1/8, 3/8, 5/8, 7/8."""
    model, parts = build(KL), iter([0.0, 1.0])

    def decode(part: Tensor) -> Tensor:
        return part.new_full((1, 1, 2, 2 * part.shape[3]), next(parts))

    monkeypatch.setattr(model, "decode", decode)
    row = model.decode_tiled(randn(1, 2, 1, 6), tile=4, overlap=2)[0, 0, 0]
    assert row.tolist() == [0, 0, 0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1, 1, 1]


@torch.no_grad()
def test_channels_last_is_kept() -> None:
    model = build(KL).to(memory_format=torch.channels_last)
    seen = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(module)
        assert args[0].is_contiguous(memory_format=torch.channels_last), module
        assert output.is_contiguous(memory_format=torch.channels_last), module

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    x, noise = randn(2, 1, 8, 8), randn(2, 2, 4, 4, seed=2)  # the bare mean is a view of moments
    model(*(each.contiguous(memory_format=torch.channels_last) for each in (x, noise)))
    assert len(seen) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.encode(randn(1, 3, 8, 8)),
            r"image must be \(N, 1, H, W\), got \(1, 3, 8, 8\)",
        ),
        (lambda m: m.encode(randn(1, 1, 9, 8)), "must be positive multiples of 2, got 9 x 8"),
        (lambda m: m.encode(randn(1, 1, 0, 8)), "must be positive multiples of 2, got 0 x 8"),
        (lambda m: m.decode(randn(1, 2, 0, 4)), r"latents must be \(N, 2, h, w\)"),
        (lambda m: m.decode(randn(1, 4, 4, 4)), r"latents must be \(N, 2, h, w\)"),
        (lambda m: m.decode_tiled(randn(1, 4, 9, 9), 4, 1), r"latents must be \(N, 2, h, w\)"),
        (lambda m: m.decode_tiled(randn(1, 2, 4, 4), 4, 4), "overlap must be in"),
        (lambda m: m.decode_tiled(randn(1, 2, 4, 4), 4, -1), "overlap must be in"),
    ],
)
def test_wrong_input_is_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(build(KL))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regularization": "vae"}, "regularization must be 'kl' or 'vq'"),
        ({"codebook_size": 8}, "codebook_size must be positive for 'vq' and 0 for 'kl'"),
        ({"attention": (True,)}, "attention must be"),
        ({"norm_groups": 3}, "norm_groups must divide"),
        ({"model_channels": 6, "channel_mult": (2, 4)}, "norm_groups must divide"),
        ({"channel_mult": (0, 2)}, r"channel_mult must be positive, got \(0, 2\)"),
        ({"latent_channels": 0}, "latent_channels must be positive"),
    ],
)
def test_wrong_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**(SMALL | change))


@pytest.mark.parametrize("config", [KL, VQ], ids=["kl", "vq"])
def test_tiles_are_encoded_where_they_lie(config: AutoencoderConfig) -> None:
    """An encoder that sees one pixel, not its surroundings, is the same in tiles."""
    model = Autoencoder(config).eval()
    model.encoder = nn.AvgPool2d(2)  # type: ignore[assignment]
    moments = 4 if config is KL else 2
    model.quant_conv = nn.Conv2d(1, moments, 1)
    x = torch.randn(2, 1, 38, 26)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_tiled(x, 8, 2), model.encode_latent(x))
    with pytest.raises(ValueError, match="image sides must be positive multiples of 2"):
        model.encode_tiled(torch.zeros(1, 1, 37, 26), 8, 2)


def test_one_tile_is_plain_encoding() -> None:
    model = Autoencoder(KL).eval()
    x = torch.randn(1, 1, 16, 12)
    with torch.no_grad():
        assert torch.equal(model.encode_tiled(x, 8, 2), model.encode_latent(x))
