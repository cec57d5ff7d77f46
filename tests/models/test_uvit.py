"""U-ViT equals a plain reading of the paper in fp64; sizes and first values as published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.samplers import SAMPLERS, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.network import kind_of, network_family
from fastdiff.models.presets import UVITS
from fastdiff.models.uvit import UViT, UViTConfig
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import run
from tests.models.test_against_diffusers import CASES, assert_equal
from tests.support.engine_requests import alone_and_together, requests_of
from tests.support.tiny import randomize

OURS = UViTConfig(
    in_channels=4,
    out_channels=4,
    width=32,
    depth=4,
    num_heads=4,
    sample_size=8,
    num_classes=10,
    null_class=True,
)
NO_CLASSES: dict[str, Any] = {"num_classes": None, "null_class": False}
TEXT = replace(OURS, **NO_CLASSES, context_dim=12, context_tokens=5)
FORMS = {
    "classes": OURS,
    "text": TEXT,
    "neither": replace(OURS, **NO_CLASSES),
    "no-conv": replace(OURS, conv_out=False),
    "time-mlp": replace(OURS, time_mlp=True, qkv_bias=True),
    "offset": replace(OURS, timestep_offset=1.0, patch_size=4),
    "learned": replace(OURS, learned_sigma=True, out_channels=8, mlp_ratio=3.0),
}


def linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def block(
    state: Mapping[str, Tensor], name: str, x: Tensor, heads: int, skip: Tensor | None = None
) -> Tensor:
    """Section 3.1: transformers as in ViT, with a linear layer on the joined long skip."""
    if skip is not None:
        x = linear(state, f"{name}.skip_linear", torch.cat([x, skip], dim=-1))
    width = x.shape[-1]
    qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x))
    rows = []
    for head in range(heads):
        d = width // heads
        q, k, v = (qkv[..., part * width + head * d :][..., :d] for part in range(3))
        rows.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d), dim=-1) @ v)
    x = x + linear(state, f"{name}.attn.out", torch.cat(rows, dim=-1))
    hidden = linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(state, f"{name}.mlp.fc2", hidden)


def reference(
    config: UViTConfig,
    state: Mapping[str, Tensor],
    x: Tensor,
    t: Tensor,
    y: Tensor | None,
    context: Tensor | None,
) -> Tensor:
    """The network of the paper, one step after the other."""
    n, p, width = len(x), config.patch_size, config.width
    half = width // 2  # sinusoids in fp32, as in the published code
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = (t.float() + config.timestep_offset)[:, None] * frequencies
    time = torch.cat([angles.cos(), angles.sin()], dim=1).to(x)
    if config.time_mlp:
        hidden = linear(state, "time_embed.0", time)
        time = linear(state, "time_embed.2", hidden * torch.sigmoid(hidden))
    patches = []
    side = config.sample_size // p
    kernel = state["patch_embed.weight"].flatten(1)
    for row in range(side):
        for column in range(side):
            patch = x[:, :, row * p : row * p + p, column * p : column * p + p]
            patches.append(patch.flatten(1) @ kernel.T + state["patch_embed.bias"])
    tokens = [time]
    if y is not None:
        tokens = [state["label_embed.weight"][y], time]
    if context is not None:
        tokens += list(linear(state, "context_embed", context).unbind(1))
    extra = len(tokens)
    h = torch.stack([*tokens, *patches], dim=1) + state["pos_embed"]
    skips = []
    for index in range(config.depth // 2):
        h = block(state, f"in_blocks.{index}", h, config.num_heads)
        skips.append(h)
    h = block(state, "middle_block", h, config.num_heads)
    for index in range(config.depth // 2):
        h = block(state, f"out_blocks.{index}", h, config.num_heads, skips.pop())
    h = linear(state, "linear_out", norm(state, "norm_out", h))[:, extra:]
    image = x.new_zeros(n, config.out_channels, config.sample_size, config.sample_size)
    for index in range(side * side):
        row, column = divmod(index, side)
        patch = h[:, index].reshape(n, p, p, config.out_channels).permute(0, 3, 1, 2)
        image[:, :, row * p : row * p + p, column * p : column * p + p] = patch
    if config.conv_out:
        image = F.conv2d(image, state["conv_out.weight"], state["conv_out.bias"], padding=1)
    return image


def conditions(config: UViTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    if config.num_classes is not None:
        return {"y": torch.tensor([0, 9, 10])}
    if config.context_dim is not None:
        return {"context": torch.randn(3, 5, 12, dtype=torch.float64).to(dtype)}
    return {}


@pytest.mark.parametrize(("dtype", "scale"), CASES)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_papers_network(form: str, dtype: torch.dtype, scale: float) -> None:
    config = FORMS[form]
    network = UViT(config).eval()
    randomize(network, 0).to(dtype)
    state = {name: value.double() for name, value in network.state_dict().items()}
    x, t = (scale * torch.randn(3, 4, 8, 8)).to(dtype), torch.tensor([0, 7, 999])
    given = conditions(config, dtype)
    context = given["context"].double() if "context" in given else None
    expected = reference(config, state, x.double(), t, given.get("y"), context)
    assert_equal(network(x, t, **given), expected.to(dtype))
    if context is not None:
        given["context"] = network.project_context(given["context"])  # type: ignore[assignment]
        assert_equal(network(x, t, **given), expected.to(dtype))


def test_the_timestep_is_embedded_as_published() -> None:
    """Frequencies 10000^(-i / (width/2)), cosines first; the published models count from 1."""
    network = UViT(replace(OURS, **NO_CLASSES, timestep_offset=1.0))
    angles = torch.tensor([1.0, 250.0]).double()[:, None] * torch.tensor(
        [10000 ** (-i / 16) for i in range(16)], dtype=torch.float64
    )
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    found = network.embed(torch.tensor([0, 249]))
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


def closed_form(config: UViTConfig) -> int:
    """Parameters, from the paper's description."""
    c, p = config.width, config.patch_size
    attention = 3 * c * c + (3 * c if config.qkv_bias else 0) + c * c + c
    block = attention + 2 * 4 * c * c + 4 * c + c + 4 * c
    half = config.depth // 2
    tokens = config.condition_tokens + (config.sample_size // p) ** 2
    channels = config.out_channels
    return (
        (config.in_channels * p * p + 1) * c
        + ((config.num_classes or 0) + config.null_class) * c
        + (config.context_dim + 1 if config.context_dim else 0) * c
        + tokens * c
        + (2 * half + 1) * block
        + half * (2 * c + 1) * c
        + 2 * c
        + (c + 1) * p * p * channels
        + (channels * (9 * channels + 1) if config.conv_out else 0)
    )


PUBLISHED = {"s": 44, "m": 131, "l": 287, "h": 501}
"""Table 1 of the paper, in millions; its deeper S has 58."""


@pytest.mark.parametrize("name", UVITS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in UViT(UVITS[name]).parameters())
    assert count == closed_form(UVITS[name])
    if name != "tiny":
        size = 58 if name.endswith("deep") else PUBLISHED[name.split("-")[1]]
        assert count / 1e6 == pytest.approx(size, abs=1)
    if name == "uvit-h-2-imagenet256":
        assert count == 500_832_016


def test_it_begins_as_published() -> None:
    """Linear layers and positions of deviation 0.02, cut at two units; no biases."""
    torch.manual_seed(0)
    network = UViT(OURS)
    linear = ("attn.qkv.weight", "attn.out.weight", "fc1.weight", "fc2.weight", "linear.weight")
    for name, parameter in network.named_parameters():
        if name == "pos_embed" or name.endswith(linear):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15), name
        if name.endswith(("attn.out.bias", "fc1.bias", "fc2.bias", "linear_out.bias")):
            assert not parameter.any(), name


def test_gradients_with_and_without_checkpointing() -> None:
    network = UViT(OURS)
    randomize(network, 1)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    gradients = []
    for again in (False, True):
        network.gradient_checkpointing = again
        network.zero_grad()
        network(x, t, y=y).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def network() -> UViT:
    made = UViT(OURS)
    randomize(made, 2)
    return prepare(made)


@pytest.mark.parametrize("form", ["classes", "text", "learned"])
def test_a_sample_has_the_bits_it_has_alone(form: str) -> None:
    """Guided and not, other samplers, the learned variance, side by side."""
    config = FORMS[form]
    network = UViT(config)
    randomize(network, 4)
    learned, tokens = config.learned_sigma, config.context_tokens or 0
    found = alone_and_together(prepare(network), (4, 8, 8), learned=learned, tokens=tokens)
    assert found == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_on_it(network: UViT, sampler: str) -> None:
    table = build_table(
        sampler, NoiseSchedule(ScheduleConfig()), 3, prediction="eps", guidance_scale=2.0
    )
    (result,) = run(network, requests_of(OURS, [table], (4, 8, 8), count=1))
    assert result.error is None
    assert result.x.isfinite().all()
    assert result.x.std() > 0


def test_it_can_be_compiled_whole(network: UViT) -> None:
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, y=y), network(x, t, y=y))


def test_what_does_not_fit(network: UViT) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 4, 8, 8),
        "t": torch.tensor(1),
        "y": torch.tensor([0, 1]),
    }
    for change, message in (
        ({"x": torch.zeros(2, 3, 8, 8)}, r"x must be \(N, 4, H, W\)"),
        ({"x": torch.zeros(2, 4, 16, 16)}, "H and W of x must be 8 x 8, got 16 x 16"),
        ({"y": None}, "y must be int64 class labels"),
        ({"context": torch.zeros(2, 1, 4)}, "context must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            network(**{**given, **change})
    with pytest.raises(ValueError, match=r"context must be \(N, 5, 12\), got \(2, 6, 12\)"):
        UViT(TEXT)(given["x"], given["t"], context=torch.zeros(2, 6, 12))
    table = build_table("ddim", NoiseSchedule(ScheduleConfig()), 2, prediction="eps")
    with pytest.raises(ValueError, match="the sides of x must be 8"):
        list(run(network, requests_of(OURS, [table], (4, 16, 16), count=1)))
    for name, value, message in (
        ("depth", 3, "depth must be even"),
        ("width", 0, "width must be positive"),
        ("num_heads", 5, "num_heads must divide width"),
        ("sample_size", 9, "sample_size must be a multiple of patch_size"),
        ("mlp_ratio", -1.0, "mlp_ratio must be positive"),
        ("num_classes", None, "null_class needs num_classes"),
        ("context_dim", 8, "context_dim and context_tokens must be set together"),
        ("timestep_offset", math.inf, "timestep_offset must be finite"),
        ("dropout", 1.0, r"dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(OURS, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes and context_dim cannot be combined"):
        replace(OURS, context_dim=8, context_tokens=3)
    with pytest.raises(ValueError, match="out_channels must be even with learned_sigma"):
        replace(OURS, out_channels=7, learned_sigma=True)
    assert kind_of(OURS) == "uvit"
    assert network_family("uvit") == (UViTConfig, UViT)
