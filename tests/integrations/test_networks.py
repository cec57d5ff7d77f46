"""diffusers' U-Nets computed as a whole by fastdiff's network, as on a GPU, against diffusers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.bench.launches import count
from fastdiff.integrations import networks
from fastdiff.integrations.networks import ATTRIBUTE, WholeUNet
from fastdiff.models import layers
from tests.integrations.models import UNETS, Network, build, images, pipeline
from tests.integrations.test_goes_on_working import add_lora
from tests.integrations.test_graphs import adapted, hooked, with_forward, with_processor
from tests.support.peers import import_diffusers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' and peft's own


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "BIAS_IS_A_LAUNCH", ("cpu", "meta"))


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item per call that our network served."""
    calls: list[int] = []
    evaluate = networks._evaluated
    monkeypatch.setattr(networks, "_evaluated", lambda *args: calls.append(1) or evaluate(*args))
    return calls


def unet(name: str = "sd15") -> Any:
    return build("UNet2DConditionModel", UNETS[name]).double()


def inputs(seed: int = 0, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return {"sample": make(2, 4, *size), "encoder_hidden_states": make(2, 5, 24), "timestep": 421}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_it_computes_the_same(name: str, evaluated: list[int]) -> None:
    network = Network("UNet2DConditionModel", UNETS[name]).double()
    given = [x.double() for x in network.inputs()]
    expected = network(*given)
    report = fastdiff.accelerate(network.inner)
    close(network(*given), expected)
    assert isinstance(network.inner, WholeUNet)
    assert len(evaluated) == 1
    assert report.network_calls_left == {}


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])
@pytest.mark.parametrize("timestep", [421, 17.5, torch.tensor(3), torch.tensor([5.0, 900.0])])
def test_sizes_and_timesteps(size: tuple[int, int], timestep: Any, evaluated: list[int]) -> None:
    plain = unet()
    model = copy.deepcopy(plain)
    fastdiff.accelerate(model)
    given = inputs(size=size) | {"timestep": timestep}
    (found,) = model(**given, return_dict=False)
    close(found, plain(**given).sample)
    assert len(evaluated) == 1


def moved(model: Any) -> None:
    model.float().double()


def replaced(model: Any) -> None:
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    layer.weight = nn.Parameter(2 * layer.weight)


def changed_in_place(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.1)


def changed_as_a_lora_is_merged(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data += 0.05


def loaded(model: Any) -> None:
    model.load_state_dict({key: 1.5 * value for key, value in model.state_dict().items()})


def another_layer(model: Any) -> None:
    torch.manual_seed(0)
    model.mid_block.resnets[0].conv1 = nn.Conv2d(64, 64, 3, padding=1).double()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [moved, replaced, changed_in_place, changed_as_a_lora_is_merged, loaded, another_layer],
)
def test_changes_of_weights_are_seen(change: Callable[[Any], None], evaluated: list[int]) -> None:
    plain, given = unet(), inputs()
    model = copy.deepcopy(plain)
    fastdiff.accelerate(model)
    model(**given)
    change(plain)
    change(model)
    found = model(**given).sample
    close(found, plain(**given).sample)
    assert len(evaluated) == 2


def chunked(model: Any) -> None:
    block = model.mid_block.attentions[0].transformer_blocks[0]
    block.set_chunk_feed_forward(chunk_size=2, dim=1)


def free(model: Any) -> None:
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def subclassed(model: Any) -> None:
    model.mid_block.resnets[0].conv1.__class__ = type("Own", (nn.Conv2d,), {})


def watched_layer(model: Any) -> None:
    model.up_blocks[0].resnets[0].conv2.register_forward_pre_hook(lambda module, args: None)


CHANGES = {
    "hook": (hooked, "a hook or a replaced forward"),
    "pre-hook of a layer": (watched_layer, "a hook or a replaced forward"),
    "forward": (with_forward, "a hook or a replaced forward"),
    "processor": (with_processor, "its processor is Own"),
    "adapter": (adapted, "a hook or a replaced forward"),
    "lora": (add_lora, "peft."),
    "chunks": (chunked, "feed-forward chunking is on"),
    "FreeU": (free, "FreeU is on"),
    "class": (subclassed, ".Own"),
}


@torch.no_grad()
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_it_cannot_compute_runs_block_by_block(
    name: str, first: bool, evaluated: list[int]
) -> None:
    """Whether it comes before or after `accelerate`; the result is that of diffusers."""
    change, reason = CHANGES[name]
    plain, given = unet(), inputs()
    model = copy.deepcopy(plain)
    if first:
        change(model)
        report = fastdiff.accelerate(model)
    else:
        report = fastdiff.accelerate(model)
        model(**given)
        evaluated.clear()
        change(model)
    change(plain)
    plain.double(), model.double()
    close(model(**given).sample, plain(**given).sample)
    assert not evaluated
    ((found, calls),) = report.network_calls_left.items()
    assert reason in found
    assert calls == 1
    assert report.data["network_calls_left"] == report.network_calls_left


@torch.no_grad()
def test_it_serves_again_when_the_reason_is_gone(evaluated: list[int]) -> None:
    plain, given = unet(), inputs()
    model = copy.deepcopy(plain)
    report = fastdiff.accelerate(model)
    hook = model.mid_block.register_forward_hook(lambda *_: None)
    model(**given)
    hook.remove()
    free(model)
    model(**given)
    model.disable_freeu()
    assert not evaluated
    close(model(**given).sample, plain(**given).sample)
    assert len(evaluated) == 1
    assert sum(report.network_calls_left.values()) == 2


def residuals() -> dict[str, Any]:
    shapes = (32, 8), (32, 8), (32, 4), (64, 4)
    down = tuple(torch.ones(2, c, s, s, dtype=torch.float64) for c, s in shapes)
    mid = torch.ones(2, 64, 4, 4, dtype=torch.float64)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


@torch.no_grad()
@pytest.mark.parametrize(
    ("more", "word"),
    [
        (residuals(), "down_block_additional_residuals"),
        ({"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 2)}, "encoder_attention_mask"),
        ({"cross_attention_kwargs": {"scale": 1.0}}, "cross_attention_kwargs"),
    ],
)
def test_arguments_that_it_does_not_know(
    more: dict[str, Any], word: str, evaluated: list[int]
) -> None:
    plain, given = unet(), inputs()
    model = copy.deepcopy(plain)
    report = fastdiff.accelerate(model)
    close(model(**given, **more).sample, plain(**given, **more).sample)
    assert not evaluated
    (reason,) = report.network_calls_left
    assert word in reason


def test_calls_that_run_as_before(evaluated: list[int]) -> None:
    plain, given = unet(), inputs()
    model = copy.deepcopy(plain)
    report = fastdiff.accelerate(model)
    found = model(**given).sample
    assert found.requires_grad
    close(found, plain(**given).sample)
    with torch.no_grad():
        model.train()
        model(**given)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            model(**given)
        with pytest.raises(RuntimeError):
            model(**given | {"sample": given["sample"].float()})
        with pytest.raises(TypeError, match="sample"):
            model(encoder_hidden_states=given["encoder_hidden_states"])
    assert not evaluated
    reasons = " ".join(report.network_calls_left)
    for word in ("gradients", "training", "autocast", "torch.float32"):
        assert word in reasons, word


@torch.no_grad()
def test_verification_compares_the_blocks(evaluated: list[int]) -> None:
    model = unet()
    report = fastdiff.accelerate(model, verify=True)
    model(**inputs())
    assert not evaluated
    assert report.verified
    assert "verify=True" in next(iter(report.network_calls_left))


@torch.no_grad()
def test_an_option_that_we_do_not_have(evaluated: list[int]) -> None:
    model = build("UNet2DConditionModel", UNETS["film"]).double()
    plain = copy.deepcopy(model)
    report = fastdiff.accelerate(model)
    close(model(**inputs()).sample, plain(**inputs()).sample)
    assert not evaluated
    assert "down_block_types" in next(iter(report.network_calls_left))


@torch.no_grad()
def test_objects_names_and_files_stay(tmp_path: Path, evaluated: list[int]) -> None:
    plain = unet()
    model = copy.deepcopy(plain)
    parameters = dict(model.named_parameters())
    report = fastdiff.accelerate(model, channels_last=False)
    model(**inputs())
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameter for name, parameter in parameters.items())
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).double()
    close(again(**inputs()).sample, plain(**inputs()).sample)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert twin.__dict__[ATTRIBUTE] is not model.__dict__[ATTRIBUTE]
        close(twin(**inputs()).sample, plain(**inputs()).sample)
    assert len(evaluated) == 3
    report.restore()
    assert type(model) is type(plain)
    assert ATTRIBUTE not in vars(model)
    close(model(**inputs()).sample, plain(**inputs()).sample)
    assert len(evaluated) == 3


@torch.no_grad()
def test_weights_that_move_leave_no_copy_behind() -> None:
    """Our network would keep a GPU's memory when a pipeline is offloaded."""
    model = unet()
    fastdiff.accelerate(model)
    model(**inputs())
    assert isinstance(model.__dict__[ATTRIBUTE]._built, nn.Module)
    model.to("meta")
    assert model.__dict__[ATTRIBUTE]._built is None


def test_pipelines(evaluated: list[int], tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.unet.double(), pipe.vae.double()
    expected = images(pipe)
    report = fastdiff.accelerate(pipe)
    found = images(pipe)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(evaluated) == 4
    assert report.network_calls_left == {}
    pipe.save_pretrained(tmp_path)
    assert '"diffusers",\n    "UNet2DConditionModel"' in (tmp_path / "model_index.json").read_text()


def test_a_pipeline_of_another_kind_takes_it(evaluated: list[int]) -> None:
    """diffusers looks for the exact class of a component."""
    pipe = pipeline()
    kind = type(pipe.unet)
    fastdiff.accelerate(pipe)
    assert type(pipe.unet) is not kind
    diffusers = import_diffusers("StableDiffusionImg2ImgPipeline")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert {kind: "found"}[type(other.unet)] == "found"
    assert type(other.unet) not in {type(pipe.vae): "another"}


@torch.no_grad()
def test_a_model_that_is_there_twice() -> None:
    model, given = unet(), inputs()
    expected = model(**given).sample
    report = fastdiff.accelerate([model, [model]])
    close(model(**given).sample, expected)
    report.restore()
    close(model(**given).sample, expected)


@torch.no_grad()
def test_fewer_launches() -> None:
    """Keys and values of all layers, and all embeddings, are one product each."""
    with torch.device("meta"):
        model = build("UNet2DConditionModel", UNETS["sd15"]).to("meta")
        given = {"sample": torch.empty(2, 4, 8, 8), "encoder_hidden_states": torch.empty(2, 5, 24)}
    plain = count(lambda: model(timestep=torch.empty((), device="meta"), **given))
    fastdiff.accelerate(model)
    found = count(lambda: model(timestep=torch.empty((), device="meta"), **given))
    assert found.total < 0.55 * plain.total
    transformers, per_transformer = 4, 8
    # of diffusers' layers, embed 2, all projections of embeddings 1, all of the context 1
    shortcuts, of_two_inputs = 5, 4  # two products in fp32
    expected = transformers * per_transformer + 2 + 1 + 1 + shortcuts + of_two_inputs
    assert found.launches["linear"] == expected


def test_on_a_cpu_blocks_run(monkeypatch: pytest.MonkeyPatch, evaluated: list[int]) -> None:
    monkeypatch.setattr(layers, "BIAS_IS_A_LAUNCH", ("cuda", "meta"))
    model = unet()
    report = fastdiff.accelerate(model)
    with torch.no_grad():
        model(**inputs())
    assert not evaluated
    assert report.network_calls_left == {}
