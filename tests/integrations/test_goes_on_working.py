"""What people do with a pipeline besides calling it, before and after `fastdiff.accelerate`."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.kernels import record_backends
from tests.integrations import models
from tests.integrations.models import (
    NETWORKS,
    UNETS,
    Network,
    assert_images_parity,
    build,
    images,
    pipeline,
)
from tests.support.parity import assert_parity

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # diffusers' and peft's own
    "ignore::DeprecationWarning",
)


def add_lora(unet: Any, seed: int = 3) -> None:
    """A LoRA on attentions, feed-forwards and convolutions, with weights that are not zero."""
    from peft import LoraConfig

    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "proj_in"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet.add_adapter(LoraConfig(r=2, target_modules=names))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str) -> None:
    pipe = pipeline()
    with_lora = copy.deepcopy(pipe.unet)
    add_lora(with_lora)
    plain = pipeline(unet=with_lora, vae=pipe.vae)
    wide = pipeline(unet=copy.deepcopy(with_lora).double(), vae=copy.deepcopy(pipe.vae).double())
    without = images(pipe)
    assert (images(plain) - without).abs().max() > 1e-3
    if when == "before":
        add_lora(pipe.unet)
    report = fastdiff.accelerate(pipe.unet, pack_cpu_weights=True, strict=True)
    if when == "after":
        add_lora(pipe.unet)
    assert report.count("attention") == (8, 0)
    with record_backends() as ran:
        assert_images_parity(pipe, wide, plain)
    assert {"add_group_norm_silu", "attention"} <= set(ran)
    assert set(pipe.unet.state_dict()) == set(with_lora.state_dict())
    pipe.unet.fuse_lora()
    with_lora.fuse_lora()
    assert_images_parity(pipe, wide, plain)
    pipe.unet.unfuse_lora()
    pipe.unet.disable_adapters()
    torch.testing.assert_close(images(pipe), without, rtol=0, atol=1e-4)
    report.restore()
    pipe.unet.delete_adapters("default")
    assert not any("fastdiff" in type(m).__module__ for m in pipe.unet.modules())


def test_merged_weights_are_seen_where_they_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft writes a merged LoRA through `.data`, which no version counter tells."""

    from fastdiff.runtime import cpu_layers

    monkeypatch.setattr(cpu_layers, "PACK_NUMBERS", 100)
    layer = nn.Conv2d(64, 64, 3, padding=1)
    fastdiff.accelerate(layer, pack_cpu_weights=True)
    x = torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data += 0.01 * torch.randn(layer.weight.shape)
        fresh = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(x), fresh)
        assert (fresh - before).abs().max() > 1e-3


def test_controlnet() -> None:
    diffusers = models.import_diffusers("StableDiffusionControlNetPipeline")
    controlnet = build(*NETWORKS["controlnet"], 5)
    parts = pipeline().components
    names = ("vae", "unet", "text_encoder", "tokenizer", "scheduler", "safety_checker")
    parts = {name: parts[name] for name in names} | {"feature_extractor": None}

    def make(**changed: Any) -> Any:
        pipe = diffusers.StableDiffusionControlNetPipeline(
            **{**parts, "controlnet": controlnet, **changed}, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pipe = make()
    learned = {k: v for k, v in pipe.components.items() if k in ("unet", "vae", "controlnet")}
    plain = make(**{k: copy.deepcopy(v) for k, v in learned.items()})
    wide = make(**{k: copy.deepcopy(v).double() for k, v in learned.items()})

    def draw(pipe: Any, seed: int = 0) -> Tensor:
        return images(pipe, seed=seed, image=image.to(pipe.unet.dtype))

    report = fastdiff.accelerate(pipe)
    assert any(e.name.startswith("controlnet.") for e in report.swapped)
    assert_images_parity(pipe, wide, plain, draw)
    report.restore()
    assert torch.equal(draw(pipe), draw(plain))


def test_another_processor_is_diffusers_own() -> None:
    """IP-Adapter, attention slicing, custom processors: decided in each call, named in a report."""
    from diffusers.models.attention_processor import AttnProcessor

    class Louder(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 1.5 * super().__call__(*args, **kwargs)

    pipe = pipeline()
    first = next(iter(pipe.unet.attn_processors))
    processors = dict(pipe.unet.attn_processors)
    changed = {name: Louder() if name == first else p for name, p in processors.items()}
    pipe.unet.set_attn_processor(dict(changed))
    loud = images(pipe)
    report = fastdiff.accelerate(pipe)
    assert [e.reason for e in report.left if e.op == "attention"] == ["its processor is Louder"]
    torch.testing.assert_close(images(pipe), loud, rtol=0, atol=1e-4)
    report.restore()

    pipe.unet.set_attn_processor(dict(processors))
    report = fastdiff.accelerate(pipe)
    assert not [e for e in report.left if e.op == "attention"]
    pipe.unet.set_attn_processor(dict(changed))
    torch.testing.assert_close(images(pipe), loud, rtol=0, atol=1e-4)
    pipe.unet.set_attn_processor(dict(processors))
    pipe.unet.set_default_attn_processor()
    pipe.vae.set_default_attn_processor()
    plain = images(pipe)
    pipe.unet.set_attention_slice(1)
    torch.testing.assert_close(images(pipe), plain, rtol=0, atol=1e-4)


def test_masks_and_head_layouts() -> None:
    """AttnProcessor and AttnProcessor2_0, masks, the norm and residual of an attention."""
    from diffusers.models import attention_processor as ap

    mask = torch.where(torch.rand(2, 1, 4) > 0.5, 0.0, -10000.0)
    mask[..., 0] = 0.0

    def drawn(seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def cross_call(module: nn.Module, seed: int) -> Tensor:
        dtype = next(module.parameters()).dtype
        x, context = drawn(seed, 2, 6, 16), drawn(seed + 100, 2, 4, 12)
        return module(x.to(dtype), context.to(dtype), mask.to(dtype))

    def image_call(module: nn.Module, seed: int) -> Tensor:
        return module(drawn(seed, 2, 16, 3, 2).to(next(module.parameters()).dtype))

    def tokens_call(module: nn.Module, seed: int) -> Tensor:
        tokens = drawn(seed, 2, 16, 3, 2).flatten(2).mT
        return module(tokens.to(next(module.parameters()).dtype), temb=None)

    for processor in (ap.AttnProcessor(), ap.AttnProcessor2_0()):
        cross = ap.Attention(16, 12, heads=2, dim_head=8, processor=processor)
        own = ap.Attention(
            16, heads=1, dim_head=16, norm_num_groups=4, residual_connection=True,
            rescale_output_factor=1.4, bias=True, processor=processor,
        )  # fmt: skip
        for module, call in ((cross, cross_call), (own, image_call), (own, tokens_call)):
            plain, wide = copy.deepcopy(module), copy.deepcopy(module).double()
            report = fastdiff.accelerate(module, strict=True)
            with torch.no_grad(), record_backends() as ran:
                assert_parity(*(partial(call, m) for m in (module, wide, plain)))
            assert "attention" in ran
            report.restore()


def test_ip_adapter_loaded_afterwards() -> None:
    pipe = pipeline()
    plain = images(pipe)
    width, cross = 10, pipe.unet.config.cross_attention_dim
    draw = torch.Generator().manual_seed(2)
    state: dict[str, dict[str, Tensor]] = {
        "image_proj": {
            "proj.weight": torch.randn(4 * cross, width, generator=draw),
            "proj.bias": torch.zeros(4 * cross),
            "norm.weight": torch.ones(cross),
            "norm.bias": torch.zeros(cross),
        },
        "ip_adapter": {},
    }
    key = 1
    for name in pipe.unet.attn_processors:
        if "attn2" in name:
            block = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k_ip", "to_v_ip"):
                shape = (block.to_k.out_features, cross)
                weight = torch.randn(shape, generator=draw) / cross**0.5
                state["ip_adapter"][f"{key}.{part}.weight"] = weight
            key += 2

    def load(unet: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unet._load_ip_adapter_weights([copy.deepcopy(state)])

    embeds = [torch.randn(4, 1, width, generator=draw)]
    eager_unet = copy.deepcopy(pipe.unet)
    load(eager_unet)
    eager = images(pipeline(unet=eager_unet, vae=pipe.vae), ip_adapter_image_embeds=embeds)
    assert (eager - plain).abs().max() > 1e-3
    fastdiff.accelerate(pipe)
    load(pipe.unet)
    found = images(pipe, ip_adapter_image_embeds=embeds)
    torch.testing.assert_close(found, eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hooks", ["model", "sequential"])
def test_hooks_of_accelerate(hooks: str, when: str) -> None:
    """What `enable_model_cpu_offload` and `enable_sequential_cpu_offload` hang on, on a CPU."""
    accelerate = pytest.importorskip("accelerate")
    network = Network(*NETWORKS["sd15"]).requires_grad_(False)
    unet, inputs = network.inner, network.inputs()
    eager = network(*inputs)

    def hook() -> None:
        if hooks == "model":
            accelerate.cpu_offload_with_hook(unet, execution_device="cpu")
        else:
            accelerate.cpu_offload(unet, execution_device="cpu")

    if when == "before":
        hook()
    report = fastdiff.accelerate(network)
    elsewhere = (hooks, when) == ("sequential", "before")  # weights whose format we cannot change
    assert report.count("memory format") == (0 if elsewhere else 1, 0)
    if when == "after":
        hook()
    with record_backends() as ran:
        torch.testing.assert_close(network(*inputs), eager, rtol=0, atol=1e-4)
    assert {"add_group_norm_silu", "add_layer_norm", "attention"} <= set(ran)
    if (hooks, when) == ("sequential", "after"):  # it keeps the weights in the format of then
        accelerate.hooks.remove_hook_from_submodules(unet)
    report.restore()
    with record_backends() as ran:
        assert torch.equal(network(*inputs), eager)
    assert not ran
    accelerate.hooks.remove_hook_from_submodules(unet)  # leaves bound forwards on the objects
    assert fastdiff.accelerate(network, strict=True).count("attention")[0] > 0
    torch.testing.assert_close(network(*inputs), eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act"])
def test_a_listener_of_the_last_norm_sees_what_it_saw(name: str) -> None:
    network = Network("UNet2DConditionModel", TINY)
    seen: list[Tensor] = []
    layer = getattr(network.inner, name)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        eager = network(*network.inputs())
        fastdiff.accelerate(network, strict=True)
        found = network(*network.inputs())
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)


def test_save_copy_pickle(tmp_path: Path) -> None:
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    kind, names = type(unet), list(unet.state_dict())
    fastdiff.accelerate(unet, pack_cpu_weights=True)
    assert isinstance(unet, kind)  # of a class that stands in for it
    assert list(unet.state_dict()) == names
    unet.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert not any("fastdiff" in type(m).__module__ for m in loaded.modules())
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, unet.state_dict()[key])
    network = Network(*NETWORKS["sd15"])
    network.inner = unet
    with torch.no_grad():
        wanted = network(*network.inputs())
        for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301
            assert torch.equal(again(*network.inputs()), wanted)


def test_gradient_checkpointing() -> None:
    results = []
    one = Network(*NETWORKS["sd15"]).train()
    for checkpointed in (False, True):
        network = copy.deepcopy(one)
        fastdiff.accelerate(network)
        if checkpointed:
            network.inner.enable_gradient_checkpointing()
        network(*network.inputs()).square().sum().backward()
        results.append({k: p.grad for k, p in network.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for key, grad in results[0].items():
        assert (results[1][key] - grad).norm() <= 1e-4 * grad.norm(), key


TINY = {
    **UNETS["sd15"],
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.mark.slow
def test_torch_compile_without_a_break() -> None:
    """One graph with our ops in it, in a model that was compiled before accelerate."""
    found: list[set[str]] = []

    def keep(graph: Any, inputs: Any) -> Any:
        names = {str(node.target) for node in graph.graph.nodes}
        found.append({op for op in ("attention", "group_norm_silu") for n in names if op in n})
        return graph.forward

    torch._dynamo.reset()
    network = Network("UNet2DConditionModel", TINY)
    inputs = network.inputs()
    with torch.no_grad():
        eager = network(*inputs)
        compiled = torch.compile(network, backend=keep, fullgraph=True)
        compiled(*inputs)
        report = fastdiff.accelerate(network)
        torch.testing.assert_close(compiled(*inputs), eager, rtol=0, atol=1e-4)
        assert len(found) == 2
        assert found[1] == {"attention", "group_norm_silu"}
        report.restore()
        assert torch.equal(compiled(*inputs), eager)
    torch._dynamo.reset()


def test_half_precision() -> None:
    network = Network(*NETWORKS["sd21"])
    wide, plain = copy.deepcopy(network).double(), copy.deepcopy(network).bfloat16()
    half = network.bfloat16()
    fastdiff.accelerate(half)

    def call(module: Network, seed: int) -> Tensor:
        dtype = next(module.parameters()).dtype
        return module(*(x.to(dtype) for x in network.inputs(seed)))

    with torch.no_grad():
        assert_parity(*(partial(call, module) for module in (half, wide, plain)))


def test_report_of_a_pipeline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=24, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    pipe = pipeline(text_encoder=transformers.CLIPTextModel(config))
    report = fastdiff.accelerate(pipe, strict=True, scheduler="fused")
    assert [(e.name, e.op) for e in report.left] == [("text_encoder", "component")]
    data = json.loads(report.json)
    assert data["counts"]["attention"] == {"swapped": 10, "left": 0}
    assert data["counts"]["scheduler"] == {"swapped": 1, "left": 0}
    assert len(data["modules"]) == len(report.entries)
    by_name = {row["name"]: row for row in data["modules"]}
    assert by_name["unet.conv_norm_out"]["by"] == "layers.GroupNormBeforeSiLU"
    assert by_name["vae.decoder.mid_block.attentions.0"]["by"] == "diffusers_blocks.Attention"
    report.print()
    printed = capsys.readouterr().out
    assert "residual block" in printed
    assert "left: not a diffusion model" in " ".join(printed.replace("│", " ").split())


def test_nested_pipelines_and_shared_modules() -> None:
    pipe = pipeline()

    class Two:
        components = {"first": pipe, "second": [pipe.unet, nn.GroupNorm(2, 4)]}  # noqa: RUF012

    report = fastdiff.accelerate(Two())
    names = [e.name for e in report.swapped if e.op != "memory format"]
    assert "first.unet.conv_norm_out" in names
    assert "second.1" in names
    assert len(set(names)) == len(names)
    assert not any(name.startswith("second.0") for name in names)
