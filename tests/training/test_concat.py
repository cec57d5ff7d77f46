"""Training on a picture behind x: masks, sketches, what reaches the network, bundles, sampling."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.checkpoint.layouts.diffusers.write import save_diffusers
from fastdiff.cli import main
from fastdiff.data import AugmentConfig, DataConfig
from fastdiff.data.scenes import make_scene, render_scene, sketch
from fastdiff.generate.facts import Facts
from fastdiff.generate.inpainting import plan as plan_inpainting
from fastdiff.generate.job import ClassJob, ImageToImageJob, InpaintJob, SampleSettings, TextJob
from fastdiff.generate.session import Session
from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.training import (
    TRAINING_PRESETS,
    AutoencoderLossConfig,
    AutoencoderRun,
    ConcatConfig,
    DenoiserLossConfig,
    DiffusionRun,
    PreviewConfig,
    TextConfig,
    for_data,
    train_autoencoder,
    train_diffusion,
)
from fastdiff.training.concat import random_masks
from fastdiff.training.task import DiffusionTask
from fastdiff.training.trainer import Trainer
from tests.training import runs

DATA = DataConfig(source="scenes", image_size=16, channels=3, scenes=12)
CHANNELS = {"inpainting": 3, "sketch": 4}  # behind latents of 2 channels and half the side
SETTINGS = SampleSettings(sampler="ddim", steps=3)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of scenes, barely trained."""
    folder = tmp_path_factory.mktemp("concat") / "first"
    model = AutoencoderConfig(
        regularization="vq",  # latents without noise
        codebook_size=16,
        image_channels=3,
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        latent_channels=2,
        norm_groups=4,
    )
    run = runs.autoencoder_run(
        Path(),
        folder,
        model=model,
        data=DATA,
        loss=AutoencoderLossConfig(adversarial_weight=0.0),
        optimization=runs.optimization(steps=2),
        output=runs.output(folder, preview_every=0),
    )
    train_autoencoder(run)
    return folder


def concat_run(kind: str, first: Path | str, folder: Path, **changes: Any) -> DiffusionRun[Any]:
    """A run on latents, or on pixels if `first` is empty."""
    channels, more = (2, CHANNELS[kind]) if first else (3, {"inpainting": 4, "sketch": 1}[kind])
    model = runs.denoiser_model(
        channels, in_channels=channels + more, num_classes=None, null_class=False, dropout=0.0
    )
    defaults: dict[str, Any] = {
        "model": model,
        "autoencoder": str(first),
        "data": DATA,
        "concat": ConcatConfig(kind=kind, dropout=0.0),  # type: ignore[arg-type]
        "preview": PreviewConfig(count=4, steps=3),
    }
    return runs.diffusion_run(Path(), folder, **{**defaults, **changes})


def pictures(count: int, size: int = 16) -> Tensor:
    """The first scenes: (N, 3, H, W) in [-1, 1]."""
    drawn = [torch.from_numpy(render_scene(make_scene(0, i), size)) for i in range(count)]
    return torch.stack(drawn).float() / 127.5 - 1


def sketches(count: int, size: int = 16) -> Tensor:
    """Their sketches: (N, 1, H, W) in [-1, 1]."""
    drawn = [torch.from_numpy(sketch(make_scene(0, i), size)) for i in range(count)]
    return torch.stack(drawn)[:, None].float() / 127.5 - 1


# --- what a batch contains ----------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 16, 64])
def test_every_mask_covers_a_part_of_the_image(side: int) -> None:
    masks = random_masks(2000, side, torch.Generator().manual_seed(0))
    assert masks.shape == (2000, 1, side, side)
    assert set(masks.unique().tolist()) == {0, 1}
    shares = masks.mean((1, 2, 3))
    assert shares.min() > 0
    assert (shares < 0.1).any()
    assert (shares > 0.5).any()
    assert 0.15 < shares.mean() < 0.45
    half = random_masks(2, side, torch.Generator().manual_seed(0))
    assert not torch.equal(half[0], half[1])


def test_a_stroke_is_a_segment_of_even_width() -> None:
    """Against the distance to 20,001 points of the segment, in fp64."""
    source = torch.Generator().manual_seed(3)
    masks = random_masks(400, 64, source)
    u = torch.rand(400, 3, 8, generator=torch.Generator().manual_seed(3)).double()
    alone = (u[:, 1, 6] >= 0.5) & (u[:, 2, 6] >= 0.5) & (u[:, 0, 5] >= 0.5)
    chosen = torch.nonzero(alone).flatten()[:8]
    assert len(chosen) == 8
    centres = (torch.arange(64).double() + 0.5) / 64
    points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 2)
    share = torch.linspace(0, 1, 20_001).double()[:, None]
    for index in chosen.tolist():
        x0, y0, x1, y1, wide = u[index, 0, :5].tolist()
        start, end = torch.tensor([x0, y0]).double(), torch.tensor([x1, y1]).double()
        away = torch.cdist(points, start + share[::50] * (end - start)).min(1).values
        inside = (away < 0.07 + 0.1 * wide).reshape(64, 64)
        assert (masks[index, 0].bool() != inside).sum() <= 2  # on the border itself


def test_pixels_read_the_kept_image_and_the_inverse_mask(tmp_path: Path) -> None:
    """As GLIDE's inpainting fine-tune: [x, image where it is kept, 1 where it is kept]."""
    task = DiffusionTask(concat_run("inpainting", "", tmp_path / "run"))
    batch = task.batch(1)
    kept = batch["extra"][:, 3:]
    assert set(kept.unique().tolist()) == {0, 1}
    assert torch.equal(batch["extra"][:, :3], batch["x0"] * kept)
    rows = torch.tensor([2, 0])
    assert torch.equal(task.batch(1, rows)["extra"], batch["extra"][rows])
    assert not torch.equal(task.batch(2)["extra"][:, 3:], kept)
    whole = concat_run(
        "inpainting", "", tmp_path / "run", concat=ConcatConfig(kind="inpainting", dropout=1.0)
    )
    assert not DiffusionTask(whole).batch(1)["extra"].any(), "all of the image is masked"


@pytest.mark.parametrize(("pixels", "views"), [(False, 0), (False, 2), (True, 0)])
def test_sampling_gives_the_network_what_training_gave_it(
    first: Path, tmp_path: Path, pixels: bool, views: int
) -> None:
    """The channels of an InpaintJob with a batch's image and mask are those of the batch."""
    run = concat_run(
        "inpainting",
        "" if pixels else first,
        tmp_path / "run",
        data=dataclasses.replace(DATA, augment=AugmentConfig(shift=2, flip=True)),
        latent_views=views,
        optimization=runs.optimization(steps=1),
    )
    train_diffusion(run)
    task = DiffusionTask(run)
    step = 7  # epoch 2 of three batches each
    extra = task.batch(step)["extra"]
    indices, epochs = task.batches.places(step)
    images = task.batches.augmented(indices, epochs % views if views else epochs)
    masks = random_masks(4, 16, fastdiff.data.generator(run.seed, "masks", step))
    session = Session.of(fastdiff.load(tmp_path / "run"))
    task.latents.scale_factor = session.model.scale_factor
    for index in range(4):
        job = InpaintJob(image=images[index], mask=masks[index], settings=SETTINGS)
        checked = fastdiff.generate.facts.check(job, session.facts)
        request = plan_inpainting(session, checked).request  # type: ignore[arg-type]
        assert request is not None
        assert request.extra is not None
        scale = 1 if pixels else session.model.scale_factor
        torch.testing.assert_close(
            request.extra / scale, extra[index] / scale, rtol=1e-4, atol=1e-4
        )


def test_a_sketch_is_that_of_the_image_and_loses_no_pixel(first: Path, tmp_path: Path) -> None:
    task = DiffusionTask(concat_run("sketch", first, tmp_path / "run"))
    extra, (indices, _) = task.batch(3)["extra"], task.batches.places(3)
    drawn = sketches(12)
    for row, index in enumerate(indices.tolist()):
        for y, x in ((0, 0), (3, 5), (7, 7)):
            block = drawn[index, 0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            assert torch.equal(extra[row, :, y, x], block.flatten())
    blank = concat_run(
        "sketch", first, tmp_path / "run", concat=ConcatConfig(kind="sketch", dropout=1.0)
    )
    assert bool((DiffusionTask(blank).batch(3)["extra"] == 1).all())


def test_a_sketch_moves_with_its_image(tmp_path: Path) -> None:
    """After augmentation its ink is where the image changes."""
    augment = AugmentConfig(shift=5, rotation=40, flip=True, fill="border")
    data = dataclasses.replace(DATA, image_size=32, augment=augment)
    task = DiffusionTask(concat_run("sketch", "", tmp_path / "run", data=data))

    def overlap(image: Tensor, drawn: Tensor) -> float:
        across = (image[:, 1:-1, 2:] - image[:, 1:-1, :-2]).abs().amax(0)
        down = (image[:, 2:, 1:-1] - image[:, :-2, 1:-1]).abs().amax(0)
        edges, ink = torch.maximum(across, down) > 0.3, drawn[1:-1, 1:-1] < 0
        return float((edges & ink).sum() / ink.sum())

    batch = task.batch(2)
    for row in range(4):
        own = overlap(batch["x0"][row], batch["extra"][row, 0])
        others = [overlap(batch["x0"][row], batch["extra"][i, 0]) for i in range(4) if i != row]
        assert own > 0.85
        assert own > max(others)


# --- what reaches the network -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inpainting", "sketch"])
def test_the_picture_reaches_the_loss_and_the_gradient(
    first: Path, tmp_path: Path, kind: str
) -> None:
    """In fp64: another picture gives another loss, and the gradient of the weights that read it is
    the difference quotient of the loss."""
    task = DiffusionTask(concat_run(kind, first, tmp_path / "run"))
    network: Any = task.network.double().eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1, generator=torch.manual_seed(1))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in task.batch(0).items()}

    def loss() -> Tensor:
        return task.losses(batch, 0)[0]["unet"]

    own = loss()
    weight = network.input_blocks[0][0].weight
    (gradient,) = torch.autograd.grad(own, weight)
    behind = gradient[:, 2:]
    assert behind.shape[1] == CHANNELS[kind]
    assert (behind.flatten(2).abs().amax((0, 2)) > 1e-6).all(), "each channel is read"
    way = torch.zeros_like(weight)
    way[:, 2:] = torch.randn(behind.shape, generator=torch.manual_seed(2), dtype=torch.float64)
    around = []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * 1e-5 * way
            around.append(loss())
            weight -= sign * 1e-5 * way
    quotient = (around[0] - around[1]) / 2e-5
    assert quotient.item() == pytest.approx((gradient * way).sum().item(), rel=1e-6)
    batch["extra"] = batch["extra"].roll(1, 0)
    assert abs(loss().item() - own.item()) > 1e-6


@pytest.mark.parametrize("kind", ["inpainting", "sketch"])
def test_it_learns_which_picture_belongs_to_which_image(
    first: Path, tmp_path: Path, kind: str
) -> None:
    """After 60 steps on four scenes their own pictures explain noise, those of others do not.

    At t = 900 hardly anything is left of an image, so the picture behind x has to say what it was.
    """
    run = concat_run(
        kind,
        first,
        tmp_path / "run",
        data=dataclasses.replace(DATA, scenes=4),
        optimization=runs.optimization(steps=400, batch_size=8, learning_rate=3e-3),
        loss=DenoiserLossConfig(timesteps="logit-normal", logit_mean=2.0),
    )
    task = DiffusionTask(run)
    trainer = Trainer(task, run)
    for _ in range(60):
        trainer.step()
    task.network.eval()
    images, _ = task.latents.batch(0)
    places, _ = task.batches.places(0)
    assert task.concat is not None
    behind = task.concat.examples(torch.arange(4))
    t = torch.full((8,), 900.0)
    noise = torch.randn(8, *images.shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def loss(away: int) -> float:
        extra = behind[(places + away) % 4]
        batches = [{"x0": images, "noise": n, "t": t, "extra": extra} for n in noise]
        return sum(task.losses(batch, 0)[0]["unet"].item() for batch in batches) / len(batches)

    others = [loss(away) for away in (1, 2, 3)]
    assert loss(0) < 0.7 * min(others)


# --- runs and bundles ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inpainting", "sketch"])
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: str, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = ConcatConfig(kind=kind, dropout=0.5)  # type: ignore[arg-type]
    whole = concat_run(kind, first, tmp_path / "whole", concat=half)
    train_diffusion(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        runs.signal_at(patch, DiffusionTask, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_diffusion(cut)
    train_diffusion(cut, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert DiffusionRun.from_json(json.loads((tmp_path / "cut/config.json").read_text())) == cut


@pytest.mark.parametrize("kind", ["inpainting", "sketch"])
def test_previews_show_what_the_bundle_samples(first: Path, tmp_path: Path, kind: str) -> None:
    """And the bundle knows what its channels mean: their number alone says upsampler or nothing."""
    run = concat_run(kind, first, tmp_path / "run")
    train_diffusion(run)
    model = fastdiff.load(tmp_path / "run")
    assert (model.extra, Facts.of(model).extra) == (kind, kind)
    assert json.loads((tmp_path / "run/model/config.json").read_text())["model"]["extra"] == kind
    assert save_bundle(model, tmp_path / "again") == model.weights_hash
    stripped = load_bundle(tmp_path / "again")
    stripped.extra, stripped.stored_hash = None, ""
    assert stripped.weights_hash != dataclasses.replace(stripped, extra=kind).weights_hash  # type: ignore[arg-type]
    task = DiffusionTask(run)
    assert model.denoiser is not None
    task.latents.scale_factor = model.scale_factor
    shown = task.sample(model.denoiser, range(3), [None] * 3)
    jobs: list[Any] = []
    if kind == "sketch":
        drawn = sketches(3)
        jobs = [ClassJob(image=drawn[i], seed=i, settings=SETTINGS) for i in range(3)]
    else:
        source, images = fastdiff.data.generator(run.seed, "masks of previews"), pictures(3)
        masks = random_masks(3, 16, source)
        jobs = [
            InpaintJob(image=images[i], mask=masks[i], seed=i, settings=SETTINGS, paste=False)
            for i in range(3)
        ]
    made = torch.stack([result.image for result in fastdiff.generate(model, jobs)])
    torch.testing.assert_close(made.float(), shown, rtol=1e-4, atol=1e-4)


def test_inpainting_keeps_unmasked_pixels(first: Path, tmp_path: Path) -> None:
    train_diffusion(concat_run("inpainting", first, tmp_path / "run"))
    model = fastdiff.load(tmp_path / "run")
    image, mask = pictures(1)[0], torch.zeros(1, 16, 16)
    mask[:, 4:12, 5:11] = 1
    job = InpaintJob(image=image, mask=mask, seed=1, settings=SETTINGS)
    made, other = (
        result.image for result in fastdiff.generate(model, [job, dataclasses.replace(job, seed=2)])
    )
    outside = (mask == 0).expand(3, -1, -1)
    assert torch.equal(made[outside], image[outside])
    assert (made - other)[~outside].abs().max() > 1e-3
    assert (made - image)[~outside].abs().mean() > 1e-2


def test_the_commands_inpaint_and_draw_after_a_sketch(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("inpainting", "sketch"):
        train_diffusion(concat_run(kind, first, Path(kind)))
    pixels = ((pictures(1)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save("scene.png")
    for number in (0, 1):
        Image.fromarray(sketch(make_scene(0, number), 16)).save(f"sketch{number}.png")
    Image.new("L", (16, 8), 255).save("low.png")
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[:8] = 255
    Image.fromarray(mask.numpy()).save("mask.png")
    steps = ["--steps", "3"]
    words = ["inpaint", "--model", "inpainting", "--image", "scene.png", "--mask", "mask.png"]
    assert main([*words, *steps, "--out", "one"]) == 0
    (made,) = Path("one").glob("*.png")
    kept = fastdiff.images.read_image(made)[:, 8:]
    assert torch.equal(kept, pictures(1)[0][:, 8:])
    words = ["sample", "--model", "sketch", "--count", "1", *steps]
    for number in (0, 1):
        folder = f"drawn{number}"
        assert main([*words, "--image", f"sketch{number}.png", "--out", folder]) == 0
    (zero,), (one,) = (list(Path(f"drawn{i}").glob("*.png")) for i in (0, 1))
    assert zero.read_bytes() != one.read_bytes()
    assert main(["sample", "--like", str(zero), "--out", "same"]) == 0, "bit for bit"
    capsys.readouterr()
    for more, message in (
        ([], "sketch draws after a sketch, black on white, and none was given; pass image="),
        (["--image", "low.png"], "a sketch must have the size of the image, 16 x 16, got 16 x 8"),
    ):
        assert main([*words, *more, "--out", "none"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_text_and_sketch_together(first: Path, tmp_path: Path) -> None:
    """Both conditions matter, and guidance scales the text while both rows see the sketch."""
    model = runs.denoiser_model(
        2, in_channels=6, num_classes=None, null_class=False, context_dim=16, dropout=0.0
    )
    run = concat_run(
        "sketch",
        first,
        tmp_path / "run",
        model=model,
        text=TextConfig(layers=1, heads=2, tokens=24, vocabulary=320),
        optimization=runs.optimization(steps=1),
        output=runs.output(tmp_path / "run", preview_every=1),
        preview=PreviewConfig(count=2, steps=3, guidance_scale=2.0),
    )
    train_diffusion(run)
    drawn = sketches(2)
    settings = dataclasses.replace(SETTINGS, guidance_scale=2.0)
    text = make_scene(0, 0).caption
    job = TextJob(prompt=text, image=drawn[0], settings=settings)
    jobs = [
        job,
        dataclasses.replace(job, prompt="two squares"),
        dataclasses.replace(job, image=drawn[1]),
    ]
    trained = fastdiff.load(tmp_path / "run")
    assert trained.denoiser is not None
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():  # one step is not enough for either to matter
        for weight in trained.denoiser.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=source))
    own, *others = (result.image for result in fastdiff.generate(trained, jobs))
    for other in others:
        assert (own - other).abs().max() > 1e-4
    again = trained.generate(text, image=drawn[0], seeds=0, sampler="ddim", steps=3)
    assert torch.equal(again[0].image, own)


@pytest.mark.parametrize("views", [0, 2])
def test_latents_are_enlarged_from_a_small_image(first: Path, tmp_path: Path, views: int) -> None:
    """Rombach et al. 2022, section 4.4: the small image has the size of the latents."""
    run = concat_run(
        "inpainting",  # has as many channels, so that only the bundle tells them apart
        first,
        tmp_path / "run",
        concat=ConcatConfig(),
        low_resolution=8,
        latent_views=views,
        data=dataclasses.replace(DATA, augment=AugmentConfig(flip=True)),
    )
    task = DiffusionTask(run)
    batch, (indices, epochs) = task.batch(5), task.batches.places(5)
    images = task.batches.augmented(indices, epochs % views if views else epochs)
    small = images.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    torch.testing.assert_close(batch["extra"], small)
    train_diffusion(run)
    model = fastdiff.load(tmp_path / "run")
    assert Facts.of(model).extra == "upsampler"
    task.latents.scale_factor = model.scale_factor
    assert model.denoiser is not None
    shown = task.sample(model.denoiser, range(2), [None] * 2)
    halved = pictures(2).unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    jobs = [ClassJob(image=halved[i], seed=i, settings=SETTINGS) for i in range(2)]
    made = torch.stack([result.image for result in fastdiff.generate(model, jobs)])
    torch.testing.assert_close(made.float(), shown, rtol=1e-4, atol=1e-4)


# --- mistakes -----------------------------------------------------------------------------------


def test_jobs_without_their_picture_are_refused(first: Path, tmp_path: Path) -> None:
    train_diffusion(concat_run("sketch", first, tmp_path / "run"))
    model = fastdiff.load(tmp_path / "run")
    image = pictures(1)[0]
    wrong: list[tuple[Any, str]] = [
        (ClassJob(), r"draws after a sketch.*fastdiff sample --image FILE"),
        (ImageToImageJob(image=image), "draws after a sketch"),
        (InpaintJob(image=image, mask=torch.ones(1, 16, 16)), "draws after a sketch"),
        (ClassJob(image=image), r"the image must be \(1, H, W\)"),
        (ClassJob(image=image[:1, :8]), "must have the size of the image, 16 x 16, got 16 x 8"),
    ]
    for job, message in wrong:
        with pytest.raises(ValueError, match=message):
            list(fastdiff.generate(model, [job]))
    with pytest.raises(
        ValueError, match=r"reads sketch channels .* with 6 .*; save it as a bundle"
    ):
        save_diffusers(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(ValueError, match=r"reads 6 channels, expected 5 for x and 'inpainting'"):
        Facts.of(dataclasses.replace(model, extra="inpainting"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig(source="digits")}, "source 'digits' has none; use scenes"),
        ({"concat": {"kind": "depth"}}, "must be none, inpainting or sketch, got 'depth'"),
        ({"concat": {"kind": "sketch", "dropout": 2.0}}, "concat dropout must be in"),
        ({"low_resolution": 8}, "both add input channels"),
        (
            {"low_resolution": 4, "concat": {}, "model": runs.denoiser_model(2, in_channels=5)},
            "low_resolution must be 8 on these latents",
        ),
        ({"low_resolution": 8, "concat": {}}, r"upsampler reads 3 .* set model in_channels to 5"),
        ({"model": runs.denoiser_model(2)}, r"sketch reads 4 channels.*set model in_channels to 6"),
    ],
)
def test_what_does_not_fit_is_refused(
    first: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    def start() -> None:
        own = {k: ConcatConfig(**v) if k == "concat" else v for k, v in changes.items()}
        DiffusionTask(concat_run("sketch", first, tmp_path / "run", **own))

    with pytest.raises(ValueError, match=message):
        start()


@pytest.mark.parametrize("kind", ["inpainting", "sketch"])
def test_presets_belong_together(kind: str) -> None:
    first, run = TRAINING_PRESETS["scenes-autoencoder"], TRAINING_PRESETS[f"scenes-{kind}"]
    assert isinstance(first, AutoencoderRun)
    assert isinstance(run, DiffusionRun)
    assert DiffusionRun.from_json(run.to_json()) == run
    assert (run.autoencoder, run.data) == (first.output.folder, first.data)
    latent, factor = first.model.latent_channels, 2 ** (len(first.model.channel_mult) - 1)
    more = {"inpainting": 1 + latent, "sketch": factor**2}[kind]
    assert (run.model.in_channels, run.model.out_channels) == (latent + more, latent)


def test_other_images_change_the_number_of_channels(tmp_path: Path) -> None:
    images = runs.image_folder(tmp_path / "images")
    run = concat_run("inpainting", "", tmp_path / "run")
    derived = for_data(run, DataConfig(source="folder", path=str(images)))
    assert (derived.model.in_channels, derived.model.out_channels) == (3, 1)  # grey
    DiffusionTask(derived).batch(0)
