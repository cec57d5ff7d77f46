"""diffusers' models before and after `fastdiff.accelerate`: results and counts."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import diffusers_blocks
from fastdiff.kernels import record_backends
from fastdiff.models import layers
from tests.integrations import models
from tests.integrations.models import (
    NETWORKS,
    Network,
    assert_images_parity,
    images,
    pipeline,
)
from tests.support.parity import assert_gradient_parity, assert_parity

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own deprecations


def gradients(module: nn.Module, result: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum with a different weight for each element of the result."""
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    (result * weights).sum().backward()
    found = {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_same_outputs_and_gradients(name: str) -> None:
    network = Network(*NETWORKS[name])
    plain, wide = copy.deepcopy(network), copy.deepcopy(network).double()
    names = list(network.state_dict())

    def call(module: nn.Module, seed: int) -> Tensor:
        return module(*(x.to(next(module.parameters()).dtype) for x in network.inputs(seed)))

    def scaled_gradients(module: nn.Module, seed: int) -> Tensor:
        """Gradients of all parameters, each divided by its rms.

        The gradient of a key's bias is 0, since softmax ignores it; it is not divided.
        """
        exact = gradients(wide, call(wide, seed))
        found = gradients(module, call(module, seed))
        assert set(found) == set(exact)
        rms = {key: grad.square().mean().sqrt() for key, grad in exact.items()}
        parts = [found[key].double() / (rms[key] if rms[key] > 1e-9 else 1) for key in exact]
        every = torch.cat([part.flatten() for part in parts])
        return every if module is wide else every.float()

    report = fastdiff.accelerate(network, strict=True)
    assert report.changed > 0
    with record_backends() as ran:
        call(network, 0)
    assert {"group_norm_silu", "attention"} <= set(ran)
    modules = network, wide, plain
    assert_parity(*(partial(call, module) for module in modules), name=name)
    assert_gradient_parity(*(partial(scaled_gradients, module) for module in modules))
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
    assert "already accelerated" in str(again)
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
    plain = pipeline(unet=copy.deepcopy(pipe.unet), vae=copy.deepcopy(pipe.vae))
    wide = pipeline(unet=copy.deepcopy(pipe.unet).double(), vae=copy.deepcopy(pipe.vae).double())
    report = fastdiff.accelerate(pipe, pack_cpu_weights=True)
    assert_images_parity(pipe, wide, plain)
    assert report.count("attention") == (
        sum(type(m).__name__ == "Attention" for c in (pipe.unet, pipe.vae) for m in c.modules()),
        0,
    )
    report.restore()
    assert torch.equal(images(pipe), images(plain))


@pytest.mark.parametrize("hook", [False, True])
def test_the_norm_adds_the_bias_of_the_first_convolution(
    hook: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. A convolution with a hook is called with its own bias."""
    network, seen = Network(*NETWORKS["sd15"]).double(), []
    given = [x.double() for x in network.inputs()]
    convs = [m.conv1 for name, m in network.named_modules() if hasattr(m, "conv1")]
    if hook:
        convs[1].register_forward_hook(lambda module, args, y: seen.append(y))
    expected = network(*given)
    fastdiff.accelerate(network, strict=True)
    monkeypatch.setattr(layers, "BIAS_IS_A_LAUNCH", ("cpu",))
    split, left = layers.split_bias, []
    monkeypatch.setattr(
        diffusers_blocks, "split_bias", lambda *args: left.append(split(*args)) or left[-1]
    )
    torch.testing.assert_close(network(*given), expected, rtol=1e-10, atol=1e-10)
    assert len(left) == len(convs)
    assert sum(bias is None for _, bias in left) == hook
    if hook:
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-10, atol=1e-10)
