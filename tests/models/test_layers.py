"""Biases of convolutions that the next norm adds, and where the convolution has to add them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff import kernels
from fastdiff.bench.launches import Count, count
from fastdiff.models import layers
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.runtime.prepare import prepare
from tests.support.tiny import randomize

CONTEXT = UNetConfig(
    in_channels=4, out_channels=4, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
    attention_depth=(1, 0), middle_depth=1, context_dim=12, num_heads=2, norm_groups=4,
)  # fmt: skip
FILM = UNetConfig(
    in_channels=4, out_channels=4, model_channels=16, channel_mult=(1, 2), num_res_blocks=2,
    attention_depth=(0, 1), middle_depth=1, num_heads=2, norm_groups=4, scale_shift_norm=True,
    resblock_updown=True,
)  # fmt: skip
KL = AutoencoderConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4, norm_groups=4,
    attention=(False, True),
)  # fmt: skip
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "context": lambda: UNet(CONTEXT),
    "film": lambda: UNet(FILM),
    "decoder": lambda: Autoencoder(KL).decoder,
    "encoder": lambda: Autoencoder(KL).encoder,
}


def inputs(name: str, **options: Any) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(**options)

    channels = 3 if name == "encoder" else 4
    found = {"x": make(2, channels, 8, 8)}
    if name in ("context", "film"):
        found["t"] = torch.tensor([3.0, 741.0]).to(device=options.get("device"))
    if name == "context":
        found["context"] = make(2, 5, 12)
    return found


@pytest.fixture
def by_the_norm(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which norms add biases on a CPU too."""
    return lambda: monkeypatch.setattr(layers, "BIAS_IS_A_LAUNCH", ("cpu", "meta"))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_norm_adds_what_the_convolution_would(
    name: str, by_the_norm: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and all gradients in fp64; with shortcuts as matrix products."""
    network = NETWORKS[name]()
    randomize(network, 1)
    network.double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected = network(**inputs(name))
    wanted = torch.autograd.grad(expected.square().sum(), [*network.parameters()])
    by_the_norm()
    split, left = layers.split_bias, []
    monkeypatch.setattr(layers, "split_bias", lambda *args: left.append(split(*args)) or left[-1])
    actual = network(**inputs(name))
    assert any(bias is not None for _, bias in left)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(actual.square().sum(), [*network.parameters()])
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


@torch.no_grad()
def test_sums_and_concatenations_go_into_norms_and_products(
    by_the_norm: Callable[[], None],
) -> None:
    network = packed_unet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected = network(**inputs("context"))
    by_the_norm()
    with kernels.record_backends() as ran:
        actual = network(**inputs("context"))
    assert {"linear_add", "linear_geglu", "cat_linear", "cat_group_norm_silu"} <= ran.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_projection_with_a_hook_is_called(by_the_norm: Callable[[], None]) -> None:
    """Whatever would be left out otherwise: the projections around GEGLU and sums, a shortcut."""
    network, calls = packed_unet().to(memory_format=torch.channels_last), set[int]()  # type: ignore[call-overload]
    transformer = network.transformers()[0]
    block = network.res_blocks()[-1]
    layers_in_it = [transformer.proj_out, transformer.blocks[0].ff.proj, block.skip]
    expected = network(**inputs("context"))
    for number, layer in enumerate(layers_in_it):
        layer.register_forward_hook(lambda *_, number=number: calls.add(number))
    by_the_norm()
    actual = network(**inputs("context"))
    assert calls == {0, 1, 2}
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def launches(name: str) -> Count:
    with torch.device("meta"):
        network = NETWORKS[name]().to(torch.bfloat16).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = inputs(name, device="meta", dtype=torch.bfloat16)
    return count(lambda: network(**given))


@pytest.mark.parametrize(
    ("name", "before_norms", "others"),
    [
        # conv1 of all 8 blocks; conv2 of the 7 that a norm follows, over a concatenation too;
        # conv_in and both resamplings. conv2 before the upsampling, and conv_out
        ("context", 8 + 7 + 3, 1 + 1),
        # conv1 and conv2 of the 6 blocks, conv_in and the upsampling. conv_out
        ("decoder", 6 + 6 + 2, 1),
    ],
)
def test_biases_leave(name: str, before_norms: int, others: int) -> None:
    """Shortcuts are matrix products, which add their biases themselves."""
    found = launches(name).launches
    assert found["convolution"] == before_norms + others
    assert found["convolution bias"] == others


@pytest.mark.parametrize("change", ["hook", "pre-hook", "backward hook", "forward", "class"])
def test_a_convolution_that_must_be_called_is_called(
    change: str, by_the_norm: Callable[[], None]
) -> None:
    by_the_norm()
    conv, calls = nn.Conv2d(4, 8, 3, padding=1), list[int]()
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    _, bias = layers.split_bias(conv, x)
    assert bias is conv.bias
    if change == "hook":
        conv.register_forward_hook(lambda *_: calls.append(1))
    elif change == "pre-hook":
        conv.register_forward_pre_hook(lambda *_: calls.append(1))
    elif change == "backward hook":
        conv.register_full_backward_hook(lambda *_: calls.append(1))
    elif change == "forward":
        forward = conv.forward
        conv.forward = lambda x: calls.append(1) or forward(x)  # type: ignore[assignment]
    else:
        conv.__class__ = type("LoRA", (nn.Conv2d,), {})
        calls.append(1)
    z, bias = layers.split_bias(conv, x)
    assert bias is None
    torch.testing.assert_close(z, conv(x))
    z.sum().backward()
    assert calls


def packed_unet() -> UNet:
    network = UNet(CONTEXT)
    randomize(network, 1)
    network.double().requires_grad_(False)
    network.pack()
    return network


def test_one_product_projects_the_embedding_for_all_blocks(by_the_norm: Callable[[], None]) -> None:
    network = packed_unet()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = network(**inputs("context"))
    by_the_norm()
    emb = torch.randn(3, CONTEXT.emb_dim, dtype=torch.float64)
    blocks = network.res_blocks()
    found = layers.project_embedding(blocks, emb)
    assert found is not None
    for block, addend in zip(blocks, found, strict=True):
        torch.testing.assert_close(addend, block.emb(emb) + block.conv1.bias, rtol=1e-12, atol=0)
    torch.testing.assert_close(network(**inputs("context")), expected, rtol=1e-11, atol=1e-11)
    after = network.state_dict()
    assert list(before) == list(after) == list(UNet(CONTEXT).state_dict())
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("packed", [True, False])
def test_one_product_projects_the_context_for_all_layers(
    packed: bool, by_the_norm: Callable[[], None]
) -> None:
    """Keys and values of every layer; a weight that was replaced takes all of them apart."""
    network, context = packed_unet(), inputs("context")["context"]
    by_the_norm()
    attentions = network.cross_attentions()
    if not packed:
        attentions[1].kv.weight = nn.Parameter(2 * attentions[1].kv.weight, requires_grad=False)
    found = network.project_context(context)
    for layer, (kv,) in zip(attentions, found, strict=True):
        assert (kv._base is not None and kv.stride(1) > kv[0, 0].numel()) == packed
        torch.testing.assert_close(kv, layer.project(context), rtol=1e-12, atol=1e-12)


def test_a_change_of_a_packed_weight_is_seen(by_the_norm: Callable[[], None]) -> None:
    network = packed_unet()
    by_the_norm()
    block = network.res_blocks()[3]
    with torch.no_grad():
        block.emb.weight.mul_(2)
        block.conv1.bias.add_(1)
    emb = torch.randn(2, CONTEXT.emb_dim, dtype=torch.float64)
    found = layers.project_embedding(network.res_blocks(), emb)
    assert found is not None
    torch.testing.assert_close(found[3], block.emb(emb) + block.conv1.bias)


@pytest.mark.parametrize("change", ["none", "moved", "replaced", "hook", "gradients", "cpu"])
def test_blocks_project_on_their_own_where_they_must(
    change: str, by_the_norm: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, calls = packed_unet(), []
    by_the_norm()
    block = network.res_blocks()[2]
    if change == "moved":
        network.float().double()
    elif change == "replaced":
        block.emb.weight = nn.Parameter(block.emb.weight.clone(), requires_grad=False)
    elif change == "hook":
        block.emb.register_forward_hook(lambda *_: calls.append(1))
    elif change == "gradients":
        network.requires_grad_()
    elif change == "cpu":
        monkeypatch.setattr(layers, "BIAS_IS_A_LAUNCH", ("cuda", "meta"))
    emb = torch.randn(2, CONTEXT.emb_dim, dtype=torch.float64)
    found = layers.project_embedding(network.res_blocks(), emb)
    assert (found is not None) == (change == "none")
    network(**inputs("context"))
    assert bool(calls) == (change == "hook")


def test_packed_networks_work_under_transforms(by_the_norm: Callable[[], None]) -> None:
    """functional_call hands wrapped tensors over, which have no storage."""
    network = packed_unet()
    given, parameters = inputs("context"), dict(network.named_parameters())

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(network, values, kwargs=given).square().sum()

    expected = torch.func.grad(loss)(parameters)
    by_the_norm()
    found = torch.func.grad(loss)(parameters)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_a_network_that_has_run_on_a_cpu_is_packed_for_a_gpu() -> None:
    """Its convolutions and linear layers have their own classes again, without copies."""
    network = UNet(CONTEXT)
    kinds = [type(module) for module in network.modules()]
    prepare(network)
    assert [type(module) for module in network.modules()] != kinds
    prepare(network, device="meta")
    assert [type(module) for module in network.modules()] == kinds
    assert not any("kept" in vars(module) or "plan" in vars(module) for module in network.modules())
    emb = torch.empty(2, CONTEXT.emb_dim, device="meta")
    assert layers.project_embedding(network.res_blocks(), emb) is not None


def test_a_packed_network_launches_one_product() -> None:
    counts = []
    for pack in (False, True):
        with torch.device("meta"):
            network = UNet(CONTEXT).to(torch.bfloat16).eval().requires_grad_(False)
        if pack:
            network.pack()
        given = inputs("context", device="meta", dtype=torch.bfloat16)
        counts.append(count(lambda n=network, g=given: n(**g)).launches)
    apart, packed = counts
    blocks, contexts = len(UNet(CONTEXT).res_blocks()), len(UNet(CONTEXT).cross_attentions())
    assert apart["linear"] - packed["linear"] == blocks - 1 + contexts - 1
    assert apart["addition"] - packed["addition"] == blocks  # the product adds the biases
    assert apart["other"] == packed["other"]


def test_biases_leave_in_compiled_graphs_too(by_the_norm: Callable[[], None]) -> None:
    by_the_norm()
    network, given = NETWORKS["context"]().eval(), inputs("context", dtype=torch.float32)
    kept: list[bool] = []

    def counted(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        for node in graph.graph.nodes:
            if "conv2d" in str(node.target):
                kept.append(len(node.args) > 2 and node.args[2] is not None)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        expected = network(**given)
        found = torch.compile(network, backend=counted, fullgraph=True)(**given)
    torch.testing.assert_close(found, expected)
    # as in test_biases_leave, and the shortcuts, which are matrix products on a GPU only
    assert (len(kept), sum(kept)) == (8 + 7 + 3 + 2 + 5, 2 + 5)
