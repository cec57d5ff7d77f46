"""diffusers' models before and after `fastdiff.accelerate`: results, counts, what goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.kernels import record_backends
from tests.integrations import models
from tests.integrations.models import NETWORKS, Network, images, pipeline
from tests.support.parity import assert_gradient_parity, assert_parity

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own deprecations


def doubled(network: Network) -> tuple[Network, list[Tensor]]:
    """The same network and inputs in fp64."""
    return copy.deepcopy(network).double(), [x.double() for x in network.inputs()]


def gradients(module: nn.Module, result: Tensor) -> dict[str, Tensor]:
    """Of a sum with a different weight for each number of the result."""
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    (result * weights).sum().backward()
    found = {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_same_outputs_and_gradients(name: str) -> None:
    network = Network(*NETWORKS[name])
    wide, wide_inputs = doubled(network)
    inputs = network.inputs()
    names = list(network.state_dict())
    eager = network(*inputs)
    reference = wide(*wide_inputs)
    before, expected = gradients(network, eager), gradients(wide, reference)

    report = fastdiff.accelerate(network, strict=True)
    assert report.changed > 0
    with record_backends() as ran:
        found = network(*inputs)
    assert {"group_norm_silu", "attention"} <= set(ran)
    assert_parity(found, reference, eager, name=name)
    after = gradients(network, found)
    # One rule for all: the largest error of a parameter of 32 numbers is luck
    scales = {key: grad.square().mean().sqrt() + 1e-30 for key, grad in expected.items()}
    flat = [
        torch.cat([(grads[key].double() / scales[key]).flatten() for key in expected])
        for grads in (after, expected, before)
    ]
    assert set(after) == set(expected)
    assert_gradient_parity(flat[0].float(), flat[1], flat[2].float())
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("name", NETWORKS)
def test_restore_is_exact(name: str) -> None:
    network = Network(*NETWORKS[name])
    inputs = network.inputs()
    with torch.no_grad():
        eager = network(*inputs)
    objects = [id(m) for m in network.modules()] + [id(p) for p in network.parameters()]
    state = [(type(m), sorted(m.__dict__), list(m._modules)) for m in network.modules()]
    strides = [p.stride() for p in network.parameters()]

    report = fastdiff.accelerate(network, pack_cpu_weights=True)
    assert [type(m) for m in network.modules()] != [kind for kind, _, _ in state]
    again = fastdiff.accelerate(network, pack_cpu_weights=True)
    assert again.changed == 0
    assert "accelerated already" in str(again)
    assert again.pairs == report.pairs
    assert [e.name for e in again.swapped] == [e.name for e in report.swapped]
    again.restore()
    with torch.no_grad():
        network(*inputs)
    report.restore()
    assert [(type(m), sorted(m.__dict__), list(m._modules)) for m in network.modules()] == state
    assert [id(m) for m in network.modules()] + [id(p) for p in network.parameters()] == objects
    assert [p.stride() for p in network.parameters()] == strides
    with torch.no_grad():
        assert torch.equal(network(*inputs), eager)


FULL = [
    # GroupNorm+SiLU pairs: two per residual block and the last norm
    ("UNet2DConditionModel", models.FULL_SD15, 2 * 22 + 1, 32, 16),
    ("UNet2DConditionModel", models.FULL_SDXL, 2 * 17 + 1, 140, 11),
    ("AutoencoderKL", models.FULL_KL, 2 * 24 + 2, 2, 2),
]


@pytest.mark.parametrize(("kind", "config", "pairs", "attentions", "other_norms"), FULL)
def test_every_norm_and_attention_at_full_size(
    kind: str, config: dict[str, Any], pairs: int, attentions: int, other_norms: int
) -> None:
    with torch.device("meta"):
        module = getattr(models.import_diffusers(kind), kind)(**config)
    report = fastdiff.accelerate(module, strict=True)
    norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
    assert report.pairs == pairs
    assert len(norms) == pairs + other_norms
    assert all("fastdiff" in type(m).__module__ for m in norms)
    assert report.count("attention") == (attentions, 0)
    found = [m for m in module.modules() if type(m).__name__ == "Attention"]
    assert len(found) == attentions
    assert report.left == []


def test_whole_pipeline() -> None:
    pipe = pipeline()
    wide = pipeline(unet=copy.deepcopy(pipe.unet).double(), vae=copy.deepcopy(pipe.vae).double())
    eager, reference = images(pipe), images(wide)
    report = fastdiff.accelerate(pipe, pack_cpu_weights=True)
    assert_parity(images(pipe), reference, eager)
    assert report.count("attention") == (
        sum(type(m).__name__ == "Attention" for c in (pipe.unet, pipe.vae) for m in c.modules()),
        0,
    )
    report.restore()
    assert torch.equal(images(pipe), eager)
