"""DiT equals diffusers' on the same random weights; positions, sizes and the start as published."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.checkpoint.layouts.diffusers import dit as diffusers_dit
from fastdiff.diffusion.samplers import SAMPLERS, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.dit import FREQUENCIES, DiT, DiTConfig, position_table
from fastdiff.models.network import kind_of, network_family
from fastdiff.models.presets import DITS
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import run
from tests.models.test_against_diffusers import CASES, assert_equal, peer_model
from tests.support.engine_requests import alone_and_together, requests_of
from tests.support.tiny import randomize

PEER = {  # three blocks of four heads, a grid of 4 x 4, patches of 2, learned variance
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
OURS = DiTConfig(
    in_channels=4,
    out_channels=8,
    width=32,
    depth=3,
    num_heads=4,
    sample_size=8,
    num_classes=10,
    null_class=True,
    learned_sigma=True,
)


def peer(dtype: torch.dtype, **change: Any) -> Any:
    """diffusers' model with random weights; its blocks embed timestep and class alike, as in every
    published file."""
    model = peer_model("DiTTransformer2DModel", {**PEER, **change}, dtype)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    return model


def ours_of(model: Any) -> DiT:
    data = {**model.config, "_class_name": "DiTTransformer2DModel"}
    network = DiT(diffusers_dit.config(data)).to(model.dtype)
    network.load_state_dict(diffusers_dit.convert_state_dict(model.state_dict(), network))
    return network.eval()


@pytest.mark.parametrize(("dtype", "scale"), CASES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_it_equals_diffusers(patch: int, dtype: torch.dtype, scale: float) -> None:
    model = peer(dtype, patch_size=patch, sample_size=4 * patch)
    network = ours_of(model)
    x = scale * torch.randn(3, 4, 4 * patch, 4 * patch, dtype=dtype)
    t, y = torch.tensor([0, 7, 999]), torch.tensor([0, 9, 10])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(x, timestep=t, class_labels=y).sample
    assert_equal(network(x, t, y=y), expected)


def test_other_sizes_equal_diffusers_and_may_be_oblong() -> None:
    """Positions are counted in tokens of the size in training; diffusers' output must be square."""
    model = peer(torch.float64)
    network = ours_of(model)
    x, t, y = torch.randn(2, 4, 12, 12, dtype=torch.float64), torch.tensor(5), torch.tensor([3, 4])
    assert_equal(network(x, t, y=y), model(x, timestep=t.expand(2), class_labels=y).sample)
    assert network(x[:, :, :8], t, y=y).shape == (2, 8, 8, 12)
    square = position_table(32, (4, 4), 4, torch.device("cpu"))
    oblong = position_table(32, (4, 6), 4, torch.device("cpu")).unflatten(0, (4, 6))
    assert torch.equal(oblong[:, 0], square.unflatten(0, (4, 4))[:, 0])


@pytest.mark.parametrize("width", [32, 1152])
def test_positions_are_those_of_the_published_code(width: int) -> None:
    """MAE's get_2d_sincos_pos_embed: the column in the first half, in fp64, rounded at the end."""
    column, row = np.meshgrid(np.arange(16, dtype=np.float32), np.arange(16, dtype=np.float32))
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    halves = []
    for places in (column.reshape(-1), row.reshape(-1)):
        angles = np.einsum("m,d->md", places, omega)
        halves += [np.sin(angles), np.cos(angles)]
    expected = torch.from_numpy(np.concatenate(halves, axis=1)).float()
    found = position_table(width, (16, 16), 16, torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


def test_the_timestep_is_embedded_as_published() -> None:
    """Frequencies 10000^(-i/128), and diffusers' 10000^(-i/127) where the config says so."""
    for shift in (0, 1):
        network = DiT(replace(OURS, frequency_shift=shift, num_classes=None, null_class=False))
        randomize(network, 0).double()
        t = torch.tensor([3.0, 250.5])
        half = FREQUENCIES // 2
        angles = t.double()[:, None] * torch.tensor(
            [10000 ** (-i / (half - shift)) for i in range(half)], dtype=torch.float64
        )
        first, _, second = network.time_embed
        hidden = torch.cat([angles.cos(), angles.sin()], dim=1)
        hidden = hidden @ first.weight.T + first.bias
        hidden = hidden * torch.sigmoid(hidden) @ second.weight.T + second.bias
        expected = hidden * torch.sigmoid(hidden)
        torch.testing.assert_close(network.embed(t), expected, rtol=1e-4, atol=1e-5)


def closed_form(config: DiTConfig) -> int:
    """Parameters, and the published table of positions, from the paper's description."""
    c, p = config.width, config.patch_size
    linear = lambda i, o: i * o + o  # noqa: E731
    block = linear(c, 3 * c) + linear(c, c) + linear(c, 4 * c) + linear(4 * c, c) + linear(c, 6 * c)
    classes = ((config.num_classes or 0) + config.null_class) * c
    return (
        linear(config.in_channels * p * p, c)
        + linear(256, c)
        + linear(c, c)
        + classes
        + config.depth * block
        + linear(c, 2 * c)
        + linear(c, config.out_channels * p * p)
        + (config.sample_size // p) ** 2 * c
    )


PUBLISHED = {"s": 33, "b": 130, "l": 458, "xl": 675}
"""Table 4 of the paper, in millions: the patches change it by less than one."""


@pytest.mark.parametrize("name", DITS)
def test_parameters(name: str) -> None:
    config = DITS[name]
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(config).parameters())
    table = (config.sample_size // config.patch_size) ** 2 * config.width
    assert count + table == closed_form(config)
    if name != "tiny":
        assert (count + table) / 1e6 == pytest.approx(PUBLISHED[name.split("-")[1]], abs=1)
    if name == "dit-xl-2":
        assert count + table == 675_129_632


def test_it_begins_as_zero_and_every_block_as_the_identity() -> None:
    torch.manual_seed(0)
    network = DiT(OURS)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.tensor([0, 1])
    assert not network(x, t, y=y).any()
    h = torch.randn(2, 16, 32)
    assert torch.equal(network.blocks[0](h, network.embed(t.expand(2), y)), h)
    assert float(network.label_embed.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    fan = math.sqrt(6 / (32 + 4 * 4))  # Xavier, the patches' convolution as a linear layer
    assert float(network.patch_embed.weight.detach().abs().max()) == pytest.approx(fan, rel=0.02)


def test_gradients_with_and_without_checkpointing() -> None:
    network = DiT(OURS)
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
def network() -> DiT:
    made = DiT(OURS)
    randomize(made, 2)
    return prepare(made)


def test_a_sample_has_the_bits_it_has_alone(network: DiT) -> None:
    """Guided and not, other samplers, the learned variance, side by side."""
    different = alone_and_together(network, (4, 8, 8), learned=True)
    assert different == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_on_it(network: DiT, sampler: str) -> None:
    options: dict[str, Any] = {"variance": "learned"} if sampler == "ddpm" else {}
    schedule = NoiseSchedule(ScheduleConfig())
    table = build_table(sampler, schedule, 3, prediction="eps", guidance_scale=2.0, **options)
    (result,) = run(network, requests_of(OURS, [table], (4, 8, 8), count=1))
    assert result.error is None
    assert result.x.isfinite().all()
    assert result.x.std() > 0


def test_it_can_be_compiled_whole(network: DiT) -> None:
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, y=y), network(x, t, y=y))


def test_what_does_not_fit() -> None:
    network = DiT(OURS)
    given: dict[str, Any] = {
        "x": torch.zeros(2, 4, 8, 8),
        "t": torch.tensor(1),
        "y": torch.tensor([0, 1]),
    }
    for change, message in (
        ({"x": torch.zeros(2, 3, 8, 8)}, r"x must be \(N, 4, H, W\)"),
        ({"x": torch.zeros(2, 4, 7, 8)}, "positive multiples of 2"),
        ({"y": None}, "y must be int64 class labels"),
        ({"context": torch.zeros(2, 1, 4)}, "context must be None"),
        ({"t": torch.zeros(3)}, "one timestep per sample"),
    ):
        with pytest.raises(ValueError, match=message):
            network(**{**given, **change})
    for name, value, message in (
        ("width", 34, "multiple of 4"),
        ("num_heads", 5, "num_heads must divide width"),
        ("depth", 0, "depth must be positive"),
        ("sample_size", 9, "sample_size must be a multiple of patch_size"),
        ("mlp_ratio", 0.0, "mlp_ratio must be positive"),
        ("num_classes", None, "null_class needs num_classes"),
        ("num_classes", 0, "num_classes must be None or positive"),
        ("out_channels", 7, "out_channels must be even with learned_sigma"),
        ("frequency_shift", 2, "frequency_shift must be 0 or 1"),
        ("mlp_norm_eps", 0.0, "mlp_norm_eps must be positive"),
        ("dropout", 1.0, r"dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(OURS, **{name: value})  # type: ignore[arg-type]
    assert kind_of(OURS) == "dit"
    assert network_family("dit") == (DiTConfig, DiT)


def test_a_mixture_of_classes_is_one_of_their_embeddings() -> None:
    network = DiT(OURS)
    randomize(network, 3)
    t = torch.tensor([4, 4])
    weights = torch.zeros(2, 11, dtype=torch.float64)
    weights[0, 3] = weights[1, 10] = 1
    assert torch.equal(network.embed(t, weights), network.embed(t, torch.tensor([3, 10])))
