"""U-Nets of diffusers as graphs, on a substitute that records operations by address
(`tests.support.tape`), which refuses to read tensors on the host."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import graphs
from fastdiff.integrations.graphs import GraphedUNet
from tests.integrations.models import UNCONDITIONAL, UNETS, build, pipeline
from tests.support.tape import HostRead, Tape

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own deprecations


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """Recorder of all models on the CPU."""
    made = Tape()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: made)
    return made


def inputs(seed: int, size: int = 8, config: str = "sd15") -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {
        "sample": torch.randn(2, 4, size, size, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=draw),
    }
    if config == "sdxl":
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, 16, generator=draw),
            "time_ids": torch.rand(2, 6, generator=draw) * 100,
        }
    return given


def close(have: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", UNETS)
def test_replayed_calls_are_diffusers(config: str, tape: Tape) -> None:
    """One graph serves other inputs and timesteps, given as diffusers accepts them."""
    plain = build("UNet2DConditionModel", UNETS[config])
    unet = copy.deepcopy(plain)
    report = fastdiff.accelerate(unet, graphs=True)
    assert report.count("graph") == (1, 0)
    kept = []
    with torch.no_grad():
        for seed, t in enumerate((torch.tensor(981), torch.tensor([7, 500]), torch.tensor(1))):
            given = inputs(seed, config=config)
            found = unet(timestep=t, **given).sample
            close(found, plain(timestep=t, **given).sample)
            kept.append((found, found.clone()))
    assert tape.replays == 3
    assert len(tape.lengths) == 2  # one for scalars, one for a timestep per sample
    assert all(torch.equal(found, then) for found, then in kept)  # later replays leave them alone
    with torch.inference_mode():
        for t in (3, 400):
            given = inputs(t, config=config)
            found = unet(given.pop("sample"), t, return_dict=False, **given)[0]
            given = inputs(t, config=config)
            close(found, plain(given.pop("sample"), t, **given).sample)
    assert len(tape.lengths) == 3
    assert report.graph_calls_left == {}


def test_a_model_without_text(tape: Tape) -> None:
    plain = build("UNet2DModel", UNCONDITIONAL)
    unet = copy.deepcopy(plain)
    fastdiff.accelerate(unet, graphs=True)
    with torch.no_grad():
        for t in (10, 20):
            x = torch.randn(2, 3, 8, 8)
            close(unet(x, t).sample, plain(x, t).sample)
    assert (tape.replays, len(tape.lengths)) == (2, 1)


def test_other_shapes_and_backends_get_other_graphs(tape: Tape) -> None:
    plain = build("UNet2DConditionModel", UNETS["sd15"])
    unet = copy.deepcopy(plain)
    fastdiff.accelerate(unet, graphs=True)
    with torch.no_grad():
        for size in (8, 16, 8):
            given = inputs(size, size)
            close(unet(timestep=5, **given).sample, plain(timestep=5, **given).sample)
        assert len(tape.lengths) == 2
        with fastdiff.backend("reference"):
            close(unet(timestep=5, **given).sample, plain(timestep=5, **given).sample)
        assert len(tape.lengths) == 3
        close(unet(timestep=5, **given).sample, plain(timestep=5, **given).sample)
    assert len(tape.lengths) == 3


def test_weights_in_place_take_effect_and_new_ones_are_recorded(tape: Tape) -> None:
    plain = build("UNet2DConditionModel", UNETS["sd15"])
    unet = copy.deepcopy(plain)
    fastdiff.accelerate(unet, graphs=True)

    def compare() -> None:
        with torch.no_grad():
            close(unet(timestep=5, **inputs(1)).sample, plain(timestep=5, **inputs(1)).sample)

    compare()
    for model in (plain, unet):
        model.conv_out.weight.data.mul_(0.5)
    compare()
    assert len(tape.lengths) == 1
    for model in (plain, unet):
        model.conv_out.weight = nn.Parameter(model.conv_out.weight.detach() * 3)
    compare()
    assert len(tape.lengths) == 2
    fresh = nn.Conv2d(32, 4, 3, padding=1)
    plain.conv_out, unet.conv_out = fresh, copy.deepcopy(fresh)
    compare()
    assert len(tape.lengths) == 3


def test_a_pipeline_makes_the_same_image(tape: Tape) -> None:
    """With a callback, which runs between the calls of the U-Net."""
    seen: list[int] = []

    def callback(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] * 0.9}

    def image(pipe: Any) -> Tensor:
        made = pipe(
            prompt_embeds=torch.ones(1, 5, 24), negative_prompt_embeds=torch.zeros(1, 5, 24),
            num_inference_steps=4, output_type="pt", callback_on_step_end=callback,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return made.images

    pipe = pipeline()
    expected = image(pipe)
    report = fastdiff.accelerate(pipe, graphs=True)
    assert [e.name for e in report.swapped if e.op == "graph"] == ["unet"]
    close(image(pipe), expected)
    assert tape.replays == 4
    assert len(tape.lengths) == 1
    assert len(seen) == 8


def hooked(unet: nn.Module) -> None:
    unet.mid_block.register_forward_hook(lambda *_: None)


class Own(nn.Module):
    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def with_processor(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Own())


AttnProcessor = type("AttnProcessor", (Own,), {})  # not that of diffusers


def with_namesake(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())


def with_forward(unet: Any) -> None:
    unet.mid_block.forward = functools.partial(unet.mid_block.forward)


def adapted(unet: Any) -> None:
    """As peft wraps a layer."""
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    wrapped = nn.Identity()
    wrapped.base_layer, wrapped.forward = layer, layer.forward  # type: ignore[assignment]
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q = wrapped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "mid_block has a hook, which a graph would run only while recording"),
        (with_processor, "attn1 has a Own, whose code a graph would run only while recording"),
        (with_namesake, "attn1 has a AttnProcessor, whose code a graph would run only while"),
        (with_forward, "mid_block has a replaced forward, which a graph would run only while"),
        (adapted, "to_q has an adapter, whose scale a graph would keep; merge it with"),
        (lambda unet: unet.__dict__.update(_hf_hook=1), "its weights are offloaded"),
    ],
)
def test_python_inside_the_model_leaves_it(
    change: Callable[[nn.Module], None], reason: str, tape: Tape
) -> None:
    """Also if it comes after `accelerate`: that is seen in the next call."""
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    change(unet)
    report = fastdiff.accelerate(unet, graphs=True)
    (entry,) = (e for e in report.left if e.op == "graph")
    assert entry.reason is not None
    assert reason in entry.reason
    assert not isinstance(unet, GraphedUNet)

    unet = build("UNet2DConditionModel", UNETS["sd15"])
    report = fastdiff.accelerate(unet, graphs=True)
    with torch.no_grad():
        unet(timestep=5, **inputs(0))
        change(unet)
        unet(timestep=5, **inputs(0))
    assert tape.replays == 1
    ((found, calls),) = report.graph_calls_left.items()
    assert calls == 1
    assert reason in found
    assert report.data["graph_calls_left"] == report.graph_calls_left


def test_calls_that_run_as_before(tape: Tape) -> None:
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    plain = copy.deepcopy(unet)
    report = fastdiff.accelerate(unet, graphs=True)
    given = inputs(0)
    expected = plain(timestep=5, **given).sample
    found = unet(timestep=5, **given).sample
    close(found, expected)
    assert found.requires_grad  # recorded by autograd as before
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            unet(timestep=5, **given)
        close(unet(timestep=5, cross_attention_kwargs={"scale": 1.0}, **given).sample, expected)
        unet.train()
        unet(timestep=5, **given)
        unet.eval()
        on_meta = {**given, "encoder_hidden_states": given["encoder_hidden_states"].to("meta")}
        unet(timestep=5, **on_meta)
    assert tape.replays == 0
    reasons = " ".join(report.graph_calls_left)
    for word in ("gradients", "autocast", "cross_attention_kwargs", "training", "on meta"):
        assert word in reasons, word
    assert sum(report.graph_calls_left.values()) == 5


def test_a_cpu_has_no_graphs() -> None:
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    report = fastdiff.accelerate(unet, graphs=True)
    with torch.no_grad():
        unet(timestep=5, **inputs(0))
    assert report.graph_calls_left == {"there are no graphs on device cpu": 1}


def test_a_forward_left_behind_by_a_hook_is_the_class_own(tape: Tape) -> None:
    """As Hugging Face's accelerate leaves it when it removes its hooks."""
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    for module in unet.modules():
        module.forward = module.forward  # type: ignore[method-assign]
    report = fastdiff.accelerate(unet, graphs=True)
    assert report.count("graph") == (1, 0)


@pytest.mark.parametrize("name", ["timestep", "encoder_hidden_states"])
def test_inputs_whose_elements_share_memory(name: str, tape: Tape) -> None:
    plain = build("UNet2DConditionModel", UNETS["sd15"])
    unet = copy.deepcopy(plain)
    report = fastdiff.accelerate(unet, graphs=True)
    with torch.no_grad():
        for seed in (5, 400):
            given = {**inputs(seed), "timestep": torch.tensor([seed, 3])}
            given[name] = given[name][:1].expand(2, *given[name].shape[1:])
            close(unet(**given).sample, plain(**given).sample)
    assert (tape.replays, len(tape.lengths)) == (2, 1)
    assert report.graph_calls_left == {}


def test_other_inputs_keep_their_strides() -> None:
    x = torch.zeros(2, 4, 6, 8)
    for one in (x, x[:, ::2], x[..., 1:3], x.to(memory_format=torch.channels_last), x[:1, :, :, 0]):
        assert graphs._at_own_address(one).stride() == one.stride()
    for one in (x[:1].expand(3, 4, 6, 8), torch.zeros(8).unfold(0, 4, 1)):
        assert graphs._at_own_address(one).is_contiguous()


def test_what_a_graph_cannot_hold_is_an_error(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    """The substitute refuses to read tensors while it records, as CUDA does."""
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    fastdiff.accelerate(unet, graphs=True)
    kind = type(unet.mid_block)
    forward = kind.forward

    def reading(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(self, x * float(x.mean() > -1e9), *args, **kwargs)

    monkeypatch.setattr(kind, "forward", reading)
    with torch.no_grad(), pytest.raises(HostRead):
        unet(timestep=5, **inputs(0))


def test_the_numbers_of_freeu_are_not_frozen(tape: Tape) -> None:
    plain = build("UNet2DConditionModel", UNETS["sd15"])
    unet = copy.deepcopy(plain)
    fastdiff.accelerate(unet, graphs=True)
    for numbers in ((0.9, 0.2, 1.2, 1.4), (0.5, 0.1, 1.5, 1.6)):
        for model in (plain, unet):
            model.enable_freeu(*numbers)
        with torch.no_grad():
            close(unet(timestep=5, **inputs(0)).sample, plain(timestep=5, **inputs(0)).sample)
    assert len(tape.lengths) == 2


def test_the_object_stays_what_it_was(tape: Tape, tmp_path: Path) -> None:
    unet = build("UNet2DConditionModel", UNETS["sd15"])
    before, signature = type(unet), inspect.signature(unet.forward)
    report = fastdiff.accelerate(unet, graphs=True)
    with torch.no_grad():
        expected = unet(timestep=5, **inputs(0)).sample
        assert isinstance(unet, before)
        assert inspect.signature(unet.forward) == signature
        assert (type(unet).__name__, type(unet).__module__) == (before.__name__, before.__module__)
        for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):  # noqa: S301
            assert isinstance(other, GraphedUNet)
            close(other(timestep=5, **inputs(0)).sample, expected)
        assert tape.replays == 3
        unet.save_pretrained(tmp_path)
        close(before.from_pretrained(tmp_path)(timestep=5, **inputs(0)).sample, expected)
        again = fastdiff.accelerate(unet, graphs=True)
        assert (again.changed, again.count("graph")) == (0, (1, 0))
        report.restore()
        assert type(unet) is before
        close(unet(timestep=5, **inputs(0)).sample, expected)
    assert tape.replays == 3


def test_graphs_want_a_denoiser() -> None:
    with pytest.raises(TypeError, match="graphs=True needs a pipeline's denoiser, got GroupNorm"):
        fastdiff.accelerate(nn.GroupNorm(2, 4), graphs=True)
    compiled = torch.compile(build("UNet2DConditionModel", UNETS["sd15"]), backend="eager")
    report = fastdiff.accelerate(compiled, graphs=True)
    assert "reduce-overhead" in next(e.reason or "" for e in report.left if e.op == "graph")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", UNETS)
def test_on_a_gpu(config: str) -> None:
    plain = build("UNet2DConditionModel", UNETS[config]).cuda()
    unet = copy.deepcopy(plain)
    eager = copy.deepcopy(plain)
    fastdiff.accelerate(eager)
    report = fastdiff.accelerate(unet, graphs=True)

    def moved(a: Any) -> Any:
        return {k: moved(v) for k, v in a.items()} if isinstance(a, dict) else a.cuda()

    with torch.inference_mode():
        for seed in range(5):
            given = moved(inputs(seed, config=config))
            found = unet(timestep=100 * seed, **given).sample
            assert torch.equal(found, eager(timestep=100 * seed, **given).sample)
            close(found, plain(timestep=100 * seed, **given).sample)
    assert report.graph_calls_left == {}
