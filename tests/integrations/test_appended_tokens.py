"""diffusers' attention whose context is appended to the keys and values of the pixels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.kernels import record_backends
from tests.support.parity import assert_gradient_parity, assert_parity
from tests.support.peers import import_diffusers
from tests.support.tiny import randomize

import_diffusers("UNet2DConditionModel")

from diffusers.models import attention_processor as theirs  # noqa: E402

PROCESSORS = ("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0")


def attention(processor: str = PROCESSORS[1], *, context: int = 12, only: bool = False) -> Any:
    module = theirs.Attention(
        query_dim=16,
        heads=2,
        dim_head=8,
        added_kv_proj_dim=context,
        norm_num_groups=4,
        bias=True,
        only_cross_attention=only,
        processor=getattr(theirs, processor)(),
    )
    return randomize(module, 3).eval()


def inputs(seed: int, *, masked: bool = False, context: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    given = {"hidden_states": torch.randn(2, 16, 4, 3, generator=draw)}
    if context:
        given["encoder_hidden_states"] = torch.randn(2, 5, 12, generator=draw)
    if masked:  # as the U-Net makes it of a mask of tokens
        keep = torch.tensor([[1.0] * 5, [1.0, 1, 0, 1, 0]])
        given["attention_mask"] = ((1 - keep) * -10000.0).unsqueeze(1)
    return given


def results(served: Any, plain: Any, made: Any) -> tuple[Any, Any, Any]:
    wide = copy.deepcopy(plain).double()
    return (
        lambda seed: served(**made(seed)),
        lambda seed: wide(**{name: x.double() for name, x in made(seed).items()}),
        lambda seed: plain(**made(seed)),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_parity(processor: str, masked: bool) -> None:
    plain = attention(processor)
    served = copy.deepcopy(plain)
    report = fastdiff.accelerate(served, strict=True)
    assert report.count("attention") == (1, 0)
    three = results(served, plain, lambda seed: inputs(seed, masked=masked))
    with record_backends() as ran:
        three[0](0)
    assert "attention" in ran
    assert_parity(*three)
    if masked:
        assert not torch.equal(served(**inputs(0)), three[0](0)), "the mask does nothing"
    report.restore()
    assert torch.equal(served(**inputs(0)), plain(**inputs(0)))


def test_gradients() -> None:
    plain = attention()
    served = copy.deepcopy(plain)
    fastdiff.accelerate(served, strict=True)
    three = results(served, plain, lambda seed: inputs(seed, masked=True))
    wide = three[1].__closure__[1].cell_contents

    def gradient(module: Any, y: Tensor) -> Tensor:
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        found = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        module.zero_grad()
        return found

    modules = (served, wide, plain)
    assert_gradient_parity(
        *(
            lambda seed, m=m, result=result: gradient(m, result(seed))
            for m, result in zip(modules, three, strict=True)
        )
    )


def test_cross_attention_only() -> None:
    plain = attention(only=True)
    assert plain.to_k is None
    served = copy.deepcopy(plain)
    assert fastdiff.accelerate(served, strict=True).count("attention") == (1, 0)
    assert_parity(*results(served, plain, inputs))


def test_without_a_context_the_tokens_are_the_pixels_before_the_norm() -> None:
    plain = attention(context=16)
    served = copy.deepcopy(plain)
    fastdiff.accelerate(served, strict=True)
    assert_parity(*results(served, plain, lambda seed: inputs(seed, context=False)))


def test_a_normed_context_runs_diffusers_own_forward() -> None:
    module = attention()
    module.norm_cross = torch.nn.LayerNorm(12)
    report = fastdiff.accelerate(module)
    assert [entry.reason for entry in report.left] == ["it has a norm_cross"]


def test_a_whole_unet_with_a_mask_of_the_tokens() -> None:
    from tests.integrations.models import APPENDED, build

    plain = build("UNet2DConditionModel", APPENDED)
    served = copy.deepcopy(plain)
    attentions = sum(type(m).__name__ == "Attention" for m in served.modules())
    assert fastdiff.accelerate(served, strict=True).count("attention") == (attentions, 0)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])

    def make(seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {
            "sample": torch.randn(2, 4, 8, 8, generator=draw),
            "timestep": torch.tensor([421.0, 7.0]),
            "encoder_hidden_states": torch.randn(2, 5, 24, generator=draw),
        }

    wide = copy.deepcopy(plain).double()

    def run(unet: Any, seed: int) -> Tensor:
        given = {name: x.to(unet.dtype) for name, x in make(seed).items()}
        return unet(**given, attention_mask=mask.to(unet.dtype)).sample

    assert_parity(*(lambda seed, u=u: run(u, seed) for u in (served, wide, plain)))
    assert not torch.equal(run(served, 0), served(**make(0)).sample)
