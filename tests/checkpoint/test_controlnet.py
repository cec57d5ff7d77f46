"""ControlNets: equal to diffusers' with the same files, in its layout and in the original one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.layouts.controlnet import (
    diffusers_config,
    diffusers_names,
    original_names,
)
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.save import save
from fastdiff.checkpoint.weights import empty_model
from fastdiff.cli import main
from fastdiff.generate.facts import Facts
from fastdiff.generate.job import TextJob
from fastdiff.generate.memory import Call, need_of
from fastdiff.generate.model import _make
from fastdiff.generate.session import Session
from fastdiff.images import read_image, read_recipe, save_png
from fastdiff.jobs.fields import Builder, Columns
from fastdiff.jobs.rows import Row
from fastdiff.models.controlnet import ControlNetConfig
from fastdiff.models.presets import UNETS
from fastdiff.serve.worker import check_served
from tests.checkpoint.pipelines import pipeline
from tests.checkpoint.test_open import compvis_state
from tests.models.test_against_diffusers import SD, SDXL, assert_equal, peer_model, randn
from tests.support.peers import import_diffusers

OWN = {"conditioning_embedding_out_channels": (16, 32)}  # the tiny autoencoder halves the sides
SIDE = 32
"""Of the pictures; latents are 16 x 16."""


def options_of(unet: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in unet.items() if k not in ("sample_size", "up_block_types")} | OWN


def net(kind: str = "sd1", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A ControlNet of diffusers with random weights, those of its zero convolutions too."""
    import_diffusers("ControlNetModel")
    made = peer_model("ControlNetModel", options_of(SDXL if kind == "sdxl" else SD), dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.add_(0.1 * noise)
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1 and an XL, and two ControlNets for the first, one for the second."""
    folder = tmp_path_factory.mktemp("controlnet")
    for kind in ("sd1", "sdxl"):
        pipeline(kind, folder / kind, torch.float32)
    net(seed=1).save_pretrained(folder / "a")
    net(seed=2).save_pretrained(folder / "b")
    net("sdxl", seed=3).save_pretrained(folder / "xl")
    return folder


def peers(home: Path, *names: str) -> tuple[Any, list[Any]]:
    diffusers: Any = import_diffusers("UNet2DConditionModel", "ControlNetModel")
    kind = "sdxl" if "xl" in names else "sd1"
    unet = diffusers.UNet2DConditionModel.from_pretrained(home / kind / "unet")
    return unet, [diffusers.ControlNetModel.from_pretrained(home / name) for name in names]


def picture(seed: int, side: int = SIDE) -> Tensor:
    """(3, side, side) in [-1, 1]."""
    return randn(3, side, side, dtype=torch.float32, seed=seed).clamp(-1, 1)


@torch.no_grad()
def expected(
    peer: tuple[Any, list[Any]],
    x: Tensor,
    t: Tensor,
    context: Tensor,
    pictures: Sequence[Tensor],
    scales: Sequence[float],
    added: dict[str, Tensor] | None = None,
) -> Tensor:
    """What diffusers' pipelines compute: residuals are summed as in its MultiControlNetModel."""
    unet, nets = peer
    residuals: list[Tensor] = []
    for one, image, scale in zip(nets, pictures, scales, strict=True):
        cond = ((image + 1) / 2)[None].expand(len(x), -1, -1, -1)
        down, middle = one(x, t, context, cond, scale, added_cond_kwargs=added, return_dict=False)
        new = [*down, middle]
        pairs = zip(residuals, new, strict=True)
        residuals = [a + b for a, b in pairs] if residuals else new
    found: Tensor = unet(
        x,
        t,
        context,
        added_cond_kwargs=added,
        down_block_additional_residuals=residuals[:-1],
        mid_block_additional_residual=residuals[-1],
    ).sample
    return found


@torch.no_grad()
def ours(
    model: Any,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    pictures: Sequence[Tensor],
    scales: Sequence[float],
    added: Tensor | None = None,
) -> Tensor:
    session = Session.of(model)
    network = session.network
    hints = [session._hint(i, each, SIDE, SIDE) for i, each in enumerate(pictures)]
    rows = [hint.expand(len(x), -1, -1, -1) for hint in hints]
    strengths = torch.tensor(scales).expand(len(x), -1)
    emb = network.embed(t, None, added)
    used = range(len(hints))
    return network.body_controlled(x, emb, network.project_context(context), used, rows, strengths)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = randn(2, 4, SIDE // 2, SIDE // 2, dtype=torch.float32)
    return x, torch.tensor([500, 20]), randn(2, 7, 24, dtype=torch.float32, seed=1)


@pytest.mark.parametrize(
    ("names", "scales"), [(["a"], [1.0]), (["a"], [0.6]), (["a", "b"], [0.7, 1.3])]
)
def test_an_evaluation_is_equal_to_diffusers(
    home: Path, names: list[str], scales: list[float]
) -> None:
    model = fastdiff.load(home / "sd1", controlnet=[home / name for name in names])
    pictures = [picture(9 + index) for index in range(len(names))]
    peer = peers(home, *names)
    theirs = expected(peer, *inputs(), pictures, scales)
    assert_equal(ours(model, *inputs(), pictures, scales), theirs)  # 1e-5 of the largest number
    plain = peer[0](*inputs()).sample
    assert (theirs - plain).abs().max() > 0.05 * plain.abs().max()


def test_xl_is_equal_to_diffusers(home: Path) -> None:
    model = fastdiff.load(home / "sdxl", controlnet=home / "xl")
    text, ids = (
        randn(2, 4, dtype=torch.float32, seed=4),
        torch.tensor([[64.0, 64, 0, 0, 64, 32]] * 2),
    )
    peer = peers(home, "xl")
    theirs = expected(peer, *inputs(), [picture(9)], [0.8], {"text_embeds": text, "time_ids": ids})
    embedded = peer[0].add_time_proj(ids.flatten()).reshape(2, -1)
    added = torch.cat([text, embedded], dim=1)
    assert_equal(ours(model, *inputs(), [picture(9)], [0.8], added), theirs)


def pictures_of(*seeds: int) -> tuple[Tensor, ...]:
    return tuple(picture(seed) for seed in seeds)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("names", "scale", "start", "end"),
    [
        (["a"], 0.9, 0.0, 1.0),
        (["a"], 1.0, 0.2, 0.8),
        (["a", "b"], (0.7, 1.1), (0.0, 0.4), (0.6, 1.0)),
    ],
    ids=["whole", "part", "two"],
)
def test_an_image_is_equal_to_diffusers(
    home: Path, names: list[str], scale: Any, start: Any, end: Any
) -> None:
    """The whole pipeline, guided, with the fraction of the steps in which each is used."""
    diffusers: Any = import_diffusers(
        "StableDiffusionControlNetPipeline", "ControlNetModel", "DDIMScheduler"
    )
    nets = [diffusers.ControlNetModel.from_pretrained(home / name) for name in names]
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        home / "sd1", controlnet=nets[0] if len(nets) == 1 else nets, safety_checker=None
    )
    pipe.scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    pipe.set_progress_bar_config(disable=True)
    model = fastdiff.load(home / "sd1", controlnet=[home / name for name in names])
    pictures = pictures_of(*range(len(names)))
    options = {"steps": 5, "guidance_scale": 3.0, "sampler": "ddim", "spacing": "trailing"}
    given = {"control_scale": scale, "control_start": start, "control_end": end}
    made = model.generate(
        "a red cat", seeds=[7], control=pictures, height=SIDE, width=SIDE, **options, **given
    )
    noise = Session.of(model).noise(7, (4, SIDE // 2, SIDE // 2))[None]

    def each(value: Any) -> Any:  # lists for several ControlNets, a value for one
        return list(value) if isinstance(value, tuple) else [value]

    images = [(image / 2 + 0.5)[None] for image in pictures]
    one = len(names) == 1
    theirs = pipe(
        "a red cat",
        image=images[0] if one else images,
        num_inference_steps=5,
        guidance_scale=3.0,
        height=SIDE,
        width=SIDE,
        latents=noise,
        controlnet_conditioning_scale=scale if one else each(scale),
        control_guidance_start=each(start),
        control_guidance_end=each(end),
        output_type="pt",
    ).images
    found = (made.tensor / 2 + 0.5).clamp(0, 1)
    assert (found - theirs).abs().max() < 1e-5
    plain = model.generate("a red cat", seeds=[7], height=SIDE, width=SIDE, **options)
    assert (plain.tensor - made.tensor).abs().max() > 0.05, "the ControlNet does nothing"


def test_rows_of_a_batch_have_the_bits_of_the_ones_made_alone(home: Path) -> None:
    """Jobs with one ControlNet, with two, in some steps and without, in one batch; the last ones
    also have the bits of a model without any."""
    model = fastdiff.load(home / "sd1", controlnet=[home / "a", home / "b"])
    a, b = pictures_of(1, 2)
    size: dict[str, Any] = {"height": SIDE, "width": SIDE}
    plan: list[dict[str, Any]] = [
        {"control": (a, None), "seed": 0},
        {"seed": 1},
        {"control": (a, b), "seed": 2, "control_end": (0.5, 1.0)},
        {"control": (None, b), "seed": 3, "control_scale": 0.5},
        {"seed": 4, "guidance_scale": 1.0},
        {"control": (b, a), "seed": 5, "steps": 3, "control_start": 0.4},
        {"control": (a, None), "seed": 6, "guidance_scale": 1.0},
    ]
    jobs = [make_job({"prompt": "a cat", "steps": 4, **size, **each}) for each in plan]
    together = [result.image for result in fastdiff.generate(model, jobs, batch=5)]
    alone = [next(fastdiff.generate(model, [job], batch=1)).image for job in jobs]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    bare = fastdiff.load(home / "sd1")
    for index in (1, 4):
        assert torch.equal(next(fastdiff.generate(bare, [jobs[index]])).image, alone[index])
    assert len({tuple(image.flatten()[:50].tolist()) for image in alone}) == len(jobs)


def make_job(options: dict[str, Any]) -> Any:
    return _make(TextJob, options)


def test_image_to_image_and_inpainting_take_a_control_picture(home: Path) -> None:
    model = fastdiff.load(home / "sd1", controlnet=home / "a")
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 8:24, 8:24] = 1
    given: dict[str, Any] = {"image": picture(3), "steps": 3, "seeds": [0], "strength": 0.7}
    for more in ({}, {"mask": mask}):
        with_it = model.generate("a cat", control=picture(1), **given, **more)
        other = model.generate("a cat", control=picture(2), **given, **more)
        plain = model.generate("a cat", **given, **more)
        assert (with_it.tensor - plain.tensor).abs().max() > 0.02
        assert (with_it.tensor - other.tensor).abs().max() > 0.02
    with pytest.raises(ValueError, match=r"size of the image, 32 x 32, got 16 x 16 .*resize it"):
        model.generate("a cat", control=picture(1, 16), **given)


def test_a_list_has_a_picture_per_seed(home: Path) -> None:
    model = fastdiff.load(home / "sd1", controlnet=home / "a")
    size: dict[str, Any] = {"height": SIDE, "width": SIDE, "steps": 2}
    one, two = pictures_of(1, 2)
    both = model.generate("a cat", seeds=[0, 0], control=[one, two], **size)
    batch = model.generate("a cat", seeds=[0, 0], control=torch.stack([one, two]), **size)
    single = model.generate("a cat", seeds=[0], control=two, **size)
    assert torch.equal(both.tensor, batch.tensor)
    assert torch.equal(both.tensor[1], single.tensor[0])
    assert not torch.equal(both.tensor[0], both.tensor[1])
    pair = fastdiff.load(home / "sd1", controlnet=[home / "a", home / "b"])
    found = pair.generate("a cat", seeds=[0, 0], control=[(one, None), (two, None)], **size)
    assert torch.equal(found.tensor, both.tensor)
    with pytest.raises(ValueError, match="control must be one for all images or one per seed"):
        pair.generate("a cat", seeds=[0, 0], control=[(one, None)], **size)


# the original layout


def original(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' weights under the names of the original files."""
    theirs, ours = diffusers_names(model), original_names(model)
    pairs = [pair for name in theirs for pair in zip(theirs[name], ours[name], strict=True)]
    return {new: state[old] for old, new in pairs}


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures, in which commands run."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one.png", 1), ("two.png", 2)):
        save_png(tmp_path / name, picture(seed))
    return tmp_path


def test_the_command_line_makes_an_image_again(
    home: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets, size = f"{home / 'a'} {home / 'b'}".split(), f"--height {SIDE} --width {SIDE}".split()
    line = [
        "txt2img",
        "a cat",
        "--model",
        str(home / "sd1"),
        "--steps",
        "2",
        "--device",
        "cpu",
        *size,
    ]
    given = ["--controlnet", *nets, "--control", "one.png", "two.png"]
    assert main([*line, *given, "--control-scale", "0.5", "0.8", "--control-end", "0.5"]) == 0
    made = read_recipe("out/a-cat-seed0.png")
    assert made["load"]["controlnet"] == nets
    assert [each["path"] for each in made["job"]["control"]] == ["one.png", "two.png"]
    assert made["job"]["controls"]["control_scale"] == [0.5, 0.8]
    capsys.readouterr()
    assert main(["txt2img", "--like", "out/a-cat-seed0.png"]) == 0
    assert "identical to out/a-cat-seed0.png, bit for bit" in capsys.readouterr().out
    save_png("one.png", picture(3))
    assert main(["txt2img", "--like", "out/a-cat-seed0.png", "--out", "other"]) == 1
    assert "control ['" in capsys.readouterr().out
    model = fastdiff.load(home / "sd1", controlnet=nets)
    control = (read_image("one.png"), read_image("two.png"))
    scale: dict[str, Any] = {"control_scale": (0.5, 0.8), "control_end": 0.5}
    ours = model.generate("a cat", control=control, steps=2, height=SIDE, width=SIDE, **scale)
    with Image.open("other/a-cat-seed0-again.png") as file:
        assert file.convert("RGB").tobytes() == ours[0].pil.tobytes()
    for words, message in (
        ([*line, "--control", "one.png"], "without a ControlNet, so control has no effect"),
        ([*line, *given[:2], "--control", "one.png", "--width", "64"], "64 x 32, got 32 x 32"),
    ):
        assert main(words) in (1, 2)
        assert message in capsys.readouterr().err


def test_rows_of_a_file_name_their_control_picture(home: Path, folder: Path) -> None:
    facts = Facts.of(fastdiff.load(home / "sd1", controlnet=home / "a"))
    build = Builder(Columns({}, ()), {"height": SIDE, "width": SIDE}, facts, seed=0, folder=folder)
    words = {"prompt": "a", "control": "one.png", "control_scale": "0.5"}
    from_path: Any = build(Row(0, words, words=True))
    assert from_path.control == (str(folder / "one.png"),)
    assert from_path.controls.control_scale == (0.5,)
    data = (folder / "two.png").read_bytes()
    from_bytes: Any = build(Row(1, {"prompt": "a", "control": data, "control_end": 0.5}))
    assert torch.equal(from_bytes.control[0], read_image("two.png"))
    assert from_bytes.controls.control_end == (0.5,)
    with pytest.raises(FileNotFoundError, match="control: no image at"):
        build(Row(2, {"prompt": "a", "control": "none.png"}))


def test_memory_of_controlled_jobs_is_estimated(home: Path) -> None:
    models = [fastdiff.load(home / "sd1", controlnet=net) for net in (None, home / "a")]
    call = Call(device=torch.device("cpu"), dtype=torch.float32, count=4)
    jobs = [
        make_job({"prompt": "a", "height": 64, "width": 64, **more})
        for more in ({}, {"control": picture(1, 64)})
    ]
    plain, without, used = (
        need_of([model], job, call, loaded=False)
        for model, job in ((models[0], jobs[0]), (models[1], jobs[0]), (models[1], jobs[1]))
    )
    size = sum(4 * each.numel() for each in models[1].controlnets[0].parameters())
    assert without.weights - plain.weights == size
    assert without.work == plain.work
    assert used.work > without.work


def test_the_original_names_are_those_that_diffusers_converts() -> None:
    """All of a published ControlNet's names, back through diffusers' own converter."""
    import_diffusers("ControlNetModel")
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    options = {k: v for k, v in options_of(SD).items() if k not in OWN}
    model = peer_model("ControlNetModel", options, torch.float32)
    state = model.state_dict()
    config = diffusers_config(json.loads(model.to_json_string()))
    own = empty_model(config, "x", 10**6)
    file = {f"control_model.{k}": v for k, v in original(own, state).items()}
    back = convert_controlnet_checkpoint(file, {"layers_per_block": 2})
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_an_original_file_is_the_same_controlnet(home: Path, tmp_path: Path, prefix: str) -> None:
    model = fastdiff.load(home / "sd1", controlnet=home / "a")
    net = model.controlnets[0]
    state = {
        f"{prefix}{k}": v.clone()
        for k, v in original(net, peers(home, "a")[1][0].state_dict()).items()
    }
    torch.save(state, tmp_path / "control.pth")
    other = fastdiff.load(home / "sd1", controlnet=tmp_path / "control.pth")
    assert other.controlnets[0].config == net.config
    for name, value in net.state_dict().items():
        assert torch.equal(other.controlnets[0].state_dict()[name], value)
    assert other.weights_hash == model.weights_hash != fastdiff.load(home / "sd1").weights_hash
    assert other.provenance["controlnet"] == [str(tmp_path / "control.pth")]
    with pytest.raises(ValueError, match="these are the weights of a ControlNet; load the model"):
        fastdiff.load(tmp_path / "control.pth")


def test_a_file_with_the_whole_model_is_both(home: Path, tmp_path: Path) -> None:
    """The first releases contain Stable Diffusion beside the ControlNet."""
    parts = pipeline("sd1", tmp_path / "model", torch.float32)
    model = fastdiff.load(home / "sd1", controlnet=home / "a")
    state = compvis_state("sd1", parts)
    own = original(model.controlnets[0], peers(home, "a")[1][0].state_dict())
    state |= {f"control_model.{name}": value for name, value in own.items()}
    path = tmp_path / "control_sd15_canny.pth"
    torch.save(state, path)
    options: dict[str, Any] = {"num_heads": 4, "text_encoders": False}
    with pytest.raises(ValueError, match="contains a ControlNet beside the model") as error:
        fastdiff.load(path, **options)
    assert f"controlnet={str(path)!r}" in str(error.value)
    both = fastdiff.load(path, controlnet=path, **options)
    beside = fastdiff.load(home / "sd1", controlnet=path)
    for found in (both, beside):
        for name, value in model.controlnets[0].state_dict().items():
            assert torch.equal(found.controlnets[0].state_dict()[name], value)


def test_counts_of_the_published_models() -> None:
    config = ControlNetConfig(encoder=UNETS["sd1"])
    count = sum(each.numel() for each in empty_model(config, "x", 10**6).parameters())
    assert count == 361_279_120
    assert config.factor == 8


# errors


def refused(match: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        function(*args, **options)


def test_other_models_and_files_are_refused(home: Path, tmp_path: Path) -> None:
    def load(kind: str, path: Path) -> None:
        fastdiff.load(home / kind, controlnet=path, device="meta")

    refused(
        r"does not fit .*sd1: added condition \(XL\) 52, the model's None", load, "sd1", home / "xl"
    )
    refused("use one that was trained for this kind of model", load, "sdxl", home / "a")
    refused("give the folder of a ControlNet", load, "sd1", home / "sd1" / "unet")
    file = home / "a" / "diffusion_pytorch_model.safetensors"
    refused("whose config is in the same folder; give that folder", load, "sd1", file)
    refused(
        "contains no ControlNet", load, "sd1", home / "sd1/unet/diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(FileNotFoundError, match="give the folder of a diffusers ControlNet"):
        load("sd1", home / "missing")
    refused(
        "contains a ControlNet; load the model that it was trained for", fastdiff.load, home / "a"
    )
    refused("with the folder as controlnet", fastdiff.load, file)
    refused(
        "a ControlNet is for a U-Net that reads text by cross-attention, got the UNet",
        fastdiff.load,
        "digits",
        controlnet=home / "a",
    )

    wide = import_diffusers("ControlNetModel").ControlNetModel(
        **options_of(SD | {"cross_attention_dim": 32})
    )
    wide.save_pretrained(tmp_path / "wide")
    message = "width of the text's tokens 32, the model's 24"
    refused(message, load, "sd1", tmp_path / "wide")
    config = json.loads((home / "a" / "config.json").read_text())
    for name, value, message in (
        ("controlnet_conditioning_channel_order", "bgr", "expected pictures as RGB"),
        ("global_pool_conditions", True, "without global pooling"),
        ("conditioning_embedding_out_channels", [16, 32, 96], "ratio of picture and latents 4"),
        ("encoder_hid_dim", 32, "ControlNetModel: encoder_hid_dim must be absent or off"),
        ("layers_per_block", 1, "residual blocks per level 1, the model's 2"),
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, name: value}))
        refused(message, load, "sd1", tmp_path / "other")


def test_an_original_file_for_another_width_is_refused(home: Path, tmp_path: Path) -> None:
    net = fastdiff.load(home / "sd1", controlnet=home / "a").controlnets[0]
    state = original(net, peers(home, "a")[1][0].state_dict())
    wide = {
        k: torch.ones(len(v), 32) if "attn2.to_k" in k or "attn2.to_v" in k else v.clone()
        for k, v in state.items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    refused(
        "width of the text's tokens 32",
        fastdiff.load,
        home / "sd1",
        controlnet=tmp_path / "wide.safetensors",
    )
    lost = {k: v.clone() for k, v in state.items() if k != "zero_convs.3.0.weight"}
    save_file({**lost, "stray": torch.ones(1)}, tmp_path / "lost.safetensors")
    refused(
        r"stray is unknown; zero_convs.3.0.weight is missing",
        fastdiff.load,
        home / "sd1",
        controlnet=tmp_path / "lost.safetensors",
    )


def test_jobs_that_do_not_fit_are_refused(home: Path, tmp_path: Path) -> None:
    one = fastdiff.load(home / "sd1", controlnet=home / "a")
    size: dict[str, Any] = {"height": SIDE, "width": SIDE, "steps": 2}
    given, a = {"control": picture(1)}, picture(1)
    plain = fastdiff.load(home / "sd1")
    refused("loaded without a ControlNet, so control has no effect", plain.generate, "a", **given)
    refused("loaded with 1 ControlNets, got 2 control", one.generate, "a", control=(a, a))
    refused("cache cannot be combined with control", one.generate, "a", cache=2, **given, **size)
    refused(
        "upscale cannot be combined with control", one.generate, "a", upscale=2, **given, **size
    )
    refused("need a picture; give control", one.generate, "a", control_scale=0.5, **size)
    refused(
        "below control_end, got 0.5 and 0.5",
        one.generate,
        "a",
        **given,
        control_start=0.5,
        control_end=0.5,
    )
    refused("must be one number or 1, one per", one.generate, "a", **given, control_scale=(1, 2))
    refused(r"control_end must be in \[0, 1\], got 2", one.generate, "a", **given, control_end=2)
    refused("control_scale must be a number", one.generate, "a", **given, control_scale="1")
    refused("control_scale must be finite", one.generate, "a", **given, control_scale=float("nan"))
    refused("control must be a file or a tensor, got int", make_job, {"prompt": "a", "control": 3})
    refused(
        "an interpolation takes no control picture",
        one.generate,
        "a",
        to_prompt="b",
        frames=2,
        **given,
    )
    refused("no field for control pictures; leave controlnet", check_served, one)
    refused("a bundle cannot contain ControlNets", save, one, tmp_path / "x")
    refused("writes no ControlNets", save, one, tmp_path / "x", layout="diffusers")
    with pytest.raises(FileNotFoundError):
        one.generate("a", control="missing.png", **size)


def test_a_recipe_keeps_them(home: Path) -> None:
    options = LoadOptions(controlnet=(Path("a"), Path("b.pth")))
    assert LoadOptions.of_recipe(json.loads(json.dumps(options.recorded))) == options
    refused(
        "controlnet must be a list of files or folders, got 3",
        LoadOptions.of_recipe,
        {"controlnet": 3},
    )
    model = fastdiff.load(home / "sd1", controlnet=home / "a")
    size: dict[str, Any] = {"height": SIDE, "width": SIDE, "steps": 2}
    job = model.generate("a", control=picture(1), control_scale=0.5, **size)[0].recipe["job"]
    assert job["control"][0]["path"] is None
    assert job["controls"] == {
        "control_scale": [0.5],
        "control_start": [0.0],
        "control_end": [1.0],
    }
    plain = model.generate("a", height=SIDE, width=SIDE, steps=2)[0].recipe["job"]
    assert plain.keys().isdisjoint({"control", "controls"})
