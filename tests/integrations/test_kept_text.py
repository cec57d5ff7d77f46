"""The text's keys and values kept per prompt, as on a GPU: never those of another prompt, and never
those of other weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import graphs, kept_text
from fastdiff.integrations.networks import ATTRIBUTE
from fastdiff.models import layers
from fastdiff.models.unet import UNet
from tests.integrations.models import images, pipeline
from tests.integrations.test_goes_on_working import add_lora
from tests.integrations.test_networks import close, unet
from tests.integrations.test_networks import inputs as inputs_of
from tests.support.tape import Tape

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' and peft's own


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "BIAS_IS_A_LAUNCH", ("cpu", "meta"))


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item per projection of a prompt."""
    made: list[int] = []
    project = UNet.project_context
    monkeypatch.setattr(
        UNet, "project_context", lambda self, context: made.append(1) or project(self, context)
    )
    return made


def inputs(seed: int = 0) -> dict[str, Any]:
    return inputs_of(seed, size=(4, 4))


def pair(**options: Any) -> tuple[Any, Any]:
    """A U-Net of diffusers, and a copy of it that keeps text."""
    plain = unet()
    model = copy.deepcopy(plain)
    fastdiff.accelerate(model, keep_text=True, **options)
    return plain, model


def compare(plain: Any, model: Any, given: dict[str, Any]) -> None:
    close(model(**given).sample, plain(**given).sample)


@torch.no_grad()
def test_a_prompt_is_projected_once(projections: list[int]) -> None:
    plain, model = pair()
    given, other = inputs(0), inputs(1)
    for timestep in (900, 500, 100):
        compare(plain, model, given | {"timestep": timestep})
        compare(plain, model, other | {"timestep": timestep, "sample": given["sample"]})
    assert len(projections) == 2


@torch.no_grad()
def test_without_the_option_each_call_projects(projections: list[int]) -> None:
    model = unet()
    fastdiff.accelerate(model)
    for _ in range(2):
        model(**inputs())
    assert len(projections) == 2


def in_place(plain: Any, model: Any, text: Tensor) -> None:
    text.mul_(1.5)


def through_a_view(plain: Any, model: Any, text: Tensor) -> None:
    text[1, 2:].copy_(torch.ones(24))


def weights_in_place(plain: Any, model: Any, text: Tensor) -> None:
    for one in (plain, model):
        for name, parameter in one.named_parameters():
            if "attn2.to_" in name:
                parameter.mul_(1.1)


def weights_loaded(plain: Any, model: Any, text: Tensor) -> None:
    values = {key: 1.5 * value for key, value in plain.state_dict().items()}
    for one in (plain, model):
        one.load_state_dict(values)


def a_weight_replaced(plain: Any, model: Any, text: Tensor) -> None:
    for one in (plain, model):
        layer = one.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        layer.weight = nn.Parameter(2 * layer.weight)


def data_replaced(plain: Any, model: Any, text: Tensor) -> None:
    for one in (plain, model):
        layer = one.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
        layer.weight.data = 2 * layer.weight.data


def converted(plain: Any, model: Any, text: Tensor) -> None:
    for one in (plain, model):
        one.float().double()


def with_lora(plain: Any, model: Any, text: Tensor) -> None:
    for one in (plain, model):
        add_lora(one)
        one.double()


def with_merged_lora(plain: Any, model: Any, text: Tensor) -> None:
    """No call sees the layers of peft, and no version counter moves."""
    for one in (plain, model):
        add_lora(one)
        one.fuse_lora()
        one.unload_lora()


CHANGES = [
    *(in_place, through_a_view, weights_in_place, weights_loaded, a_weight_replaced),
    *(data_replaced, converted, with_lora, with_merged_lora),
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "recorded"),
    [*((change, False) for change in CHANGES), (in_place, True), (with_merged_lora, True)],
)
def test_changes_are_seen(
    change: Callable[[Any, Any, Tensor], None], recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same tensor, which holds the same or another text."""
    tape = Tape()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: tape)
    plain, model = pair(graphs=recorded)
    given = inputs()
    before = model(**given).sample
    change(plain, model, given["encoder_hidden_states"])
    compare(plain, model, given)
    if change is not converted:
        assert (model(**given).sample - before).abs().max() > 1e-4
    assert bool(tape.replays) is recorded


def test_a_merge_leaves_version_counters_alone() -> None:
    """Why diffusers' functions that merge have to drop what is kept."""
    model = unet()
    weight = model.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    before, version, address = weight.detach().clone(), weight._version, weight.data_ptr()
    with_merged_lora(model, unet(), torch.empty(0))
    assert (weight - before).abs().max() > 1e-4
    assert (weight._version, weight.data_ptr()) == (version, address)


@torch.no_grad()
def test_an_address_is_no_identity(projections: list[int]) -> None:
    plain, model = pair()
    given = inputs()
    text = given.pop("encoder_hidden_states")
    storage = text.untyped_storage()
    compare(plain, model, given | {"encoder_hidden_states": text})
    text.data.mul_(2)  # which no counter sees
    del text
    again = torch.empty(0, dtype=torch.float64).set_(storage, 0, (2, 5, 24))
    compare(plain, model, given | {"encoder_hidden_states": again})
    assert len(projections) == 2


@torch.no_grad()
def test_what_is_kept_goes_with_the_prompt() -> None:
    _, model = pair()
    given = inputs()
    model(**given)
    kept = model.__dict__[ATTRIBUTE].text
    (one,) = kept._kept.values()
    part = weakref.ref(one.projected[0][0])
    del one
    assert part() is not None
    del given
    gc.collect()
    assert part() is None
    for seed in range(kept_text.LIMIT + 2):
        prompts = [inputs(seed) for _ in range(3)]
        for prompt in prompts:
            model(**prompt)
        assert len(kept._kept) <= kept_text.LIMIT


def test_calls_under_autograd_and_inference_mode(projections: list[int]) -> None:
    plain, model = pair()
    given = inputs()
    with torch.no_grad():
        compare(plain, model, given)
    text = given["encoder_hidden_states"].requires_grad_()
    gradients = []
    for one in (plain, model):
        (gradient,) = torch.autograd.grad(one(**given).sample.square().sum(), text)
        gradients.append(gradient)
    close(gradients[1], gradients[0])
    text.requires_grad_(False)
    with torch.inference_mode():
        compare(plain, model, given)  # a tensor with a counter
        made = inputs(3)
        compare(plain, model, made)  # one without
        made["encoder_hidden_states"].mul_(2)
        compare(plain, model, made)
    with torch.no_grad():
        compare(plain, model, given)
    assert len(projections) == 3  # the first text once, the other in each call


@torch.no_grad()
def test_other_streams_and_recordings_by_others(
    monkeypatch: pytest.MonkeyPatch, projections: list[int]
) -> None:
    """What is launched on another stream may not be complete, and recorded work is not done."""
    text, weight = torch.ones(2, 5, 24), torch.ones(3)
    stream = [7]
    capturing = [False]

    class OnGpu:
        """A tensor as `_state` sees it."""

        is_cuda, device, _version = True, torch.device("cuda", 0), 0

        def is_inference(self) -> bool:
            return False

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": stream[0]})
    )
    state: Any = kept_text._state
    first = state(OnGpu(), [weight])
    assert state(OnGpu(), [weight]) == first
    stream[0] = 8
    assert state(OnGpu(), [weight]) != first
    capturing[0] = True
    assert state(OnGpu(), [weight]) is None
    assert state(text, [weight]) is not None


@torch.no_grad()
def test_in_graphs_a_prompt_is_copied_once(
    monkeypatch: pytest.MonkeyPatch, projections: list[int]
) -> None:
    tape = Tape()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: tape)
    plain, model = pair(graphs=True)
    projecting = copy.deepcopy(plain)
    fastdiff.accelerate(projecting, graphs=True)
    first, second = inputs(0), inputs(1)
    compare(plain, projecting, first)
    projections.clear()
    copied: list[int] = []
    load = graphs._Call.load

    def counted(self: Any, leaves: list[Any], text: Any) -> None:
        before = [leaf._version for leaf in self.tensors]
        load(self, leaves, text)
        after = [leaf._version for leaf in self.tensors]
        copied.append(sum(a != b for a, b in zip(after, before, strict=True)))

    monkeypatch.setattr(graphs._Call, "load", counted)
    for given in (first, first, second, second, first):
        compare(plain, model, given)
    assert len(projections) == 2
    blocks = 4
    assert copied == [3 + blocks, 3, 3 + blocks, 3, 3 + blocks]
    whole, kept = tape.lengths
    assert kept < whole  # the graph has no projection
    (call,) = model.__dict__[graphs.ATTRIBUTE]._calls.values()
    assert all(leaf.is_contiguous() for leaf in call.tensors)


def test_pipelines(projections: list[int]) -> None:
    pipe = pipeline()
    pipe.unet.double(), pipe.vae.double()
    expected = images(pipe)
    report = fastdiff.accelerate(pipe, keep_text=True)
    found = images(pipe)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(projections) == 1
    assert report.network_calls_left == {}


@torch.no_grad()
def test_copies_second_calls_and_restore(projections: list[int]) -> None:
    plain = unet()
    model = copy.deepcopy(plain)
    first = fastdiff.accelerate(model)
    second = fastdiff.accelerate(model, keep_text=True)
    given = inputs()
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        projections.clear()
        compare(plain, twin, given)
        compare(plain, twin, given)
        assert len(projections) == 1
    second.restore()
    projections.clear()
    compare(plain, model, given)
    compare(plain, model, given)
    assert len(projections) == 2
    first.restore()
    assert type(model) is type(plain)


def test_it_needs_a_network_that_reads_text() -> None:
    with pytest.raises(TypeError, match=r"keep_text=True needs a UNet2DConditionModel, got GroupN"):
        fastdiff.accelerate(nn.GroupNorm(2, 4), keep_text=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, projections: list[int]) -> None:
    monkeypatch.setattr(layers, "BIAS_IS_A_LAUNCH", ("cuda", "meta"))
    plain = unet().float().cuda()
    model = copy.deepcopy(plain)
    fastdiff.accelerate(model, keep_text=True, graphs=True)
    for seed in (0, 0, 1):
        draw = inputs(seed)
        given = {k: v.float().cuda() if isinstance(v, Tensor) else v for k, v in draw.items()}
        for _ in range(3):
            found, expected = model(**given).sample, plain(**given).sample
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(projections) == 3
