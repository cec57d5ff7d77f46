"""Launches, bytes and FLOPs of networks, counted on the meta device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import kernels
from fastdiff.bench import counts, launches
from tests.support.peers import import_diffusers


def meta(*shape: int, channels_last: bool = False) -> Tensor:
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def test_a_convolution_and_its_bias() -> None:
    x, weight, bias = meta(2, 8, 16, 16, channels_last=True), meta(12, 8, 3, 3), meta(12)
    found = launches.count(lambda: F.conv2d(x, weight, bias, padding=1))
    assert found.launches == {"convolution": 1, "convolution bias": 1}
    assert found.flops == 2 * 2 * 12 * 16 * 16 * 8 * 9
    y = 2 * 12 * 16 * 16
    assert found.bytes == 2 * (x.numel() + weight.numel() + y + (2 * y + 12))
    without = launches.count(lambda: F.conv2d(x, weight, None, padding=1))
    assert without.launches == {"convolution": 1}


def test_a_result_is_channels_last_if_the_input_or_the_weight_is() -> None:
    x, weight = meta(2, 8, 16, 16), meta(12, 8, 3, 3, channels_last=True)
    y = []
    launches.count(lambda: y.append(F.conv2d(x, weight, padding=1)))
    assert y[0].is_contiguous(memory_format=torch.channels_last)


def test_views_launch_nothing_and_copies_one() -> None:
    x = meta(2, 8, 16, 16, channels_last=True)
    tokens = launches.count(lambda: x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (4, 2)))
    assert tokens.total == 0 == tokens.bytes
    assert launches.count(x.contiguous).launches == {"other": 1}


def test_products() -> None:
    x, layer = meta(3, 5, 8), nn.Linear(8, 16, device="meta", dtype=torch.bfloat16)
    found = launches.count(lambda: layer(x))
    assert found.launches == {"linear": 1}
    assert found.flops == 2 * 3 * 5 * 8 * 16
    assert found.bytes == 2 * (3 * 5 * 8 + 8 * 16 + 16 + 3 * 5 * 16)


def test_attention_is_one_launch_in_pytorch_and_in_ours() -> None:
    q, k = meta(2, 64, 4, 40), meta(2, 77, 4, 40)
    heads_first = q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2)
    theirs = launches.count(lambda: F.scaled_dot_product_attention(*heads_first))
    ours = launches.count(lambda: kernels.attention(q, k, k))
    assert theirs.launches == ours.launches == {"attention": 1}
    assert theirs.flops == ours.flops == 4 * 2 * 4 * 64 * 77 * 40


def test_an_eager_norm_reads_twice() -> None:
    x = meta(1, 32, 8, 8)
    found = launches.count(lambda: F.silu(F.group_norm(x, 4)))
    assert found.launches == {"norm": 3, "other": 1}
    statistics = 2 * 4 * x.element_size()
    assert found.bytes == 2 * (3 + 2) * x.numel() + statistics


@pytest.mark.parametrize(("side", "expected"), [(8, 1), (512, 2)])
def test_our_norm_counts_what_its_plan_launches(side: int, expected: int) -> None:
    x = meta(1, 320, side, side, channels_last=True)
    found = launches.count(lambda: kernels.group_norm_silu(x, 32))
    assert found.launches == {"norm": expected}
    assert found.bytes == 2 * x.numel() * (2 if expected == 1 else 3)


def test_an_unknown_operator_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"aten::cumsum has no number of launches; add it to LAUN"):
        launches.count(lambda: meta(4).cumsum(0))


def test_flops_of_both_networks_agree() -> None:
    """diffusers' evaluation also has the embedding and the text's keys and values; of Stable
    Diffusion 1.5 ours runs once, and not for both rows, what precedes the first cross-attention:
    three convolutions, five products by 320 x 320 and the self-attention of 64 x 64 pixels.
    """
    import_diffusers("AutoencoderKL")
    pixels, width = 64 * 64, 320
    products = 9 * (4 + 2 * width) * width + 5 * width**2
    shared = {"SD 1.5 U-Net": 2 * pixels * (products + 2 * pixels * width)}
    for job in launches.DIFFUSERS:
        ours = launches.counts()[job, "fastdiff"].flops
        theirs = launches.counts()[job, "diffusers"].flops
        accelerated = launches.counts()[job, "diffusers, accelerated"].flops
        assert theirs == accelerated
        assert 0.99 < (ours + shared.get(job, 0)) / theirs <= 1


LIMITS = {"SD 1.5 U-Net": 408, "SDXL U-Net": 974, "KL-f8 decoder": 108, "ADM-256 U-Net": 657}
"""Launches of our own networks with Triton's norms, as counted on 1 Dec 2026. Lower them with
each launch saved."""


ACCELERATED_LIMITS = {"SD 1.5 U-Net": (418, 5.1e9), "KL-f8 decoder": (155, 8.9e9)}
"""Launches and bytes of accelerated diffusers."""


@pytest.mark.parametrize("job", LIMITS)
def test_launches_stay_within_their_limits(job: str) -> None:
    assert launches.native(launches.GPU_JOBS[job]).total <= LIMITS[job]


@pytest.mark.parametrize("job", ACCELERATED_LIMITS)
def test_accelerated_networks_stay_within_their_limits(job: str) -> None:
    import_diffusers("AutoencoderKL")
    found = launches.counts()[job, "diffusers, accelerated"]
    most, most_bytes = ACCELERATED_LIMITS[job]
    assert found.total <= most
    assert found.bytes <= most_bytes


@pytest.mark.parametrize("request_kind", launches.STEPS)
def test_a_step_launches_three_kernels_outside_the_network(request_kind: str) -> None:
    """The gathered input, the sampler's update, the advance; one more for rescale's statistics."""
    options = launches.STEPS[request_kind]
    assert launches.step_count(**options).total == (4 if "rescale" in options else 3)


def test_the_page_equals_the_count() -> None:
    import_diffusers("AutoencoderKL")
    found, expected = counts.DOCS.read_text(), counts.whole_page()
    assert found == expected, "run python -m fastdiff.bench.counts launches --docs"
