"""Both stages from images to samples through the public API, in every kind that can be trained."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.checkpoint.layouts.bundle import load_bundle
from fastdiff.generate.core import SampleSettings
from fastdiff.generate.latent import LatentDiffusion
from fastdiff.training import DenoiserLossConfig, train_autoencoder, train_diffusion
from fastdiff.training.autoencoder import AutoencoderTask
from fastdiff.training.diffusion import DiffusionTask
from tests.training import runs

SETTINGS = SampleSettings(steps=4, guidance_scale=1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.image_folder(tmp_path_factory.mktemp("images"))


def flat_folder(folder: Path) -> Path:
    """Eight grey images without classes."""
    folder.mkdir()
    source = np.random.default_rng(0)
    for number in range(8):
        pixels = source.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_vq_latents_are_trained_on_and_sampled(images: Path, tmp_path: Path) -> None:
    first = runs.autoencoder_run(
        images, tmp_path / "first", "vq", optimization=runs.optimization(steps=20)
    )
    train_autoencoder(first)
    start = AutoencoderTask(first).autoencoder.state_dict()
    trained = load_bundle(tmp_path / "first").autoencoder
    assert trained is not None
    moved = [name for name, value in trained.state_dict().items() if not value.equal(start[name])]
    assert any("codebook" in name for name in moved), "the codebook never learned"
    second = runs.diffusion_run(
        images,
        tmp_path / "second",
        data=first.data,
        autoencoder=str(tmp_path / "first"),
        model=runs.denoiser_model(2),
        optimization=runs.optimization(steps=20),
    )
    train_diffusion(second)
    bundle = load_bundle(tmp_path / "second")
    assert bundle.config.scale_factor != 1.0
    assert bundle.autoencoder is not None
    for name, value in bundle.autoencoder.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), "the first stage must not move"
    sampled = LatentDiffusion.from_bundle(bundle)([0, 1], [3, 4], SETTINGS)
    assert sampled.shape == (2, 1, 16, 16)
    assert not torch.equal(sampled[0], sampled[1])


def test_learned_variance_on_pixels_is_trained_and_sampled(images: Path, tmp_path: Path) -> None:
    """The variance half learns from the bound alone, the mean half from the simple loss alone."""
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        model=runs.denoiser_model(out_channels=2, learned_sigma=True, dropout=0.0),
        prediction="eps",
        loss=DenoiserLossConfig(bound_weight=1e-3),
        optimization=runs.optimization(steps=10, batch_size=8),
    )
    gradients = {}
    for weight in (0.0, 1e-3, 1.0):
        changed = dataclasses.replace(run, loss=DenoiserLossConfig(bound_weight=weight))
        task = DiffusionTask(changed)
        loss, _ = task.losses(task.batch(0), 0)
        loss["unet"].backward()
        gradients[weight] = task.unet.conv_out.weight.grad.clone()
    mean, variance = 0, 1
    torch.testing.assert_close(gradients[0.0][mean], gradients[1.0][mean], rtol=1e-5, atol=1e-7)
    assert gradients[0.0][variance].abs().max() == 0
    assert gradients[1e-3][variance].abs().max() > 0
    thousandfold = gradients[1e-3][variance] * 1000
    assert (thousandfold - gradients[1.0][variance]).norm() < 1e-4 * thousandfold.norm()
    train_diffusion(run)
    bundle = load_bundle(tmp_path / "run")
    assert bundle.unet is not None
    start = DiffusionTask(run).unet.conv_out.weight
    assert (bundle.unet.conv_out.weight != start).flatten(1).any(1).all(), "both halves learned"
    pipeline = LatentDiffusion.from_bundle(bundle)
    settings = dataclasses.replace(SETTINGS, sampler="ddpm", clamp=1.0)
    sampled = pipeline([0, 1], [3, 4], settings)
    assert sampled.shape == (2, 1, 8, 8)
    with torch.no_grad():  # the second half reaches the sampler: another variance, another image
        bundle.unet.conv_out.bias[variance] += 3
    assert not torch.equal(pipeline([0, 1], [3, 4], settings), sampled)


def test_the_bound_of_a_learned_variance_is_the_papers(images: Path, tmp_path: Path) -> None:
    """IDDPM eq. 4 and 16: 0.001 * T * KL(q(x_{t-1} | x_t, x0) || p), bits per dimension."""
    run = runs.diffusion_run(
        images,
        tmp_path / "run",
        model=runs.denoiser_model(out_channels=2, learned_sigma=True, dropout=0.0),
        prediction="eps",
        loss=DenoiserLossConfig(),
    )
    task = DiffusionTask(run)
    part = {name: value[:2] for name, value in task.batch(0).items()}
    part["x0"], part["noise"] = part["x0"].double(), part["noise"].double()
    part["t"] = torch.tensor([5, 700])
    answer = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    task.unet.forward = lambda x, t, **_: answer  # type: ignore[method-assign]
    total = float(task.losses(part, 0)[0]["unet"])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    cumulative = (1 - betas).cumprod(0)
    expected = float((answer[:, :1] - part["noise"]).square().mean())
    for row, t in enumerate((5, 700)):
        a, before, beta = cumulative[t], cumulative[t - 1], betas[t]
        x0, noise = part["x0"][row], part["noise"][row]
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        guess = (x - (1 - a).sqrt() * answer[row, :1]) / a.sqrt()
        c0, cx = before.sqrt() * beta / (1 - a), (1 - beta).sqrt() * (1 - before) / (1 - a)
        tilde = beta * (1 - before) / (1 - a)
        share = (answer[row, 1:] + 1) / 2
        std = (0.5 * (share * beta.log() + (1 - share) * tilde.log())).exp()
        q = torch.distributions.Normal(c0 * x0 + cx * x, tilde.sqrt())
        p = torch.distributions.Normal(c0 * guess + cx * x, std)
        bits = torch.distributions.kl_divergence(q, p).mean() / np.log(2)
        expected += 1e-3 * 1000 * float(bits) / 2
    assert total == pytest.approx(expected, rel=1e-5)


def test_images_without_classes_train_a_model_without_classes(tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "flat")
    model = runs.denoiser_model(num_classes=None, null_class=False)
    run = runs.diffusion_run(images, tmp_path / "run", model=model, class_dropout=0.5)
    assert set(DiffusionTask(run).batch(0)) == {"x0", "noise", "t"}
    train_diffusion(run)
    with Image.open(tmp_path / "run/samples/step_00000006.png") as sheet:
        assert sheet.size == (16, 16), "four samples make a square"
    bundle = load_bundle(tmp_path / "run")
    assert bundle.config.class_names == ()
    sampled = LatentDiffusion.from_bundle(bundle)([None], [3], SETTINGS)
    assert sampled.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"has 2 classes, the data has 0.*num_classes to None"):
        train_diffusion(dataclasses.replace(run, model=runs.denoiser_model()))


def test_posterior_noise_is_fresh_in_every_step(images: Path, tmp_path: Path) -> None:
    run = runs.autoencoder_run(images, tmp_path / "first", optimization=runs.optimization(steps=1))
    task = AutoencoderTask(run)
    noises = [task.batch(step)["noise"] for step in (0, 1, 0)]
    assert torch.equal(noises[0], noises[2])
    assert not torch.isclose(noises[0], noises[1]).any()
    train_autoencoder(run)
    for views in (0, 1):
        second = runs.diffusion_run(
            images,
            tmp_path / "second",
            data=dataclasses.replace(run.data, augment=type(run.data.augment)()),
            autoencoder=str(tmp_path / "first"),
            model=runs.denoiser_model(2),
            latent_views=views,
            optimization=runs.optimization(batch_size=12),  # every step sees all images
        )
        denoiser = DiffusionTask(second)
        sorted_rows = []
        for step in (0, 1):
            order = denoiser.batches.order.batch(step)[0].argsort()
            batch = denoiser.batch(step)
            sorted_rows.append((batch["x0"][order], batch["noise"][order]))
        for one, other in zip(*sorted_rows, strict=True):
            assert not torch.isclose(one, other, rtol=1e-4).all(dim=(1, 2, 3)).any()


def test_impossible_combinations_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole timesteps, got timesteps 'logit-normal'"):
        runs.diffusion_run(
            tmp_path / "nowhere",
            tmp_path / "run",
            model=runs.denoiser_model(out_channels=2, learned_sigma=True),
            loss=DenoiserLossConfig(timesteps="logit-normal"),
        )


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_other_images_than_at_the_start_are_noticed(
    images: Path, tmp_path: Path, stage: str
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    make, train = {
        "autoencoder": (runs.autoencoder_run, train_autoencoder),
        "denoiser": (runs.diffusion_run, train_diffusion),
    }[stage]
    run = make(folder, tmp_path / "run", optimization=runs.optimization(steps=1))
    train(run)  # type: ignore[operator]
    renamed = folder / "a/same-order-other-name.png"
    (folder / "a/10.png").rename(renamed)  # the last of its class: nothing changed for training
    train(run, resume=True)  # type: ignore[operator]
    shutil.copy(folder / "b/01.png", folder / "b/99.png")
    with pytest.raises(ValueError, match=r"have changed .*had 12, there are 13"):
        train(run, resume=True)  # type: ignore[operator]
    (folder / "b/99.png").unlink()
    shutil.copy(folder / "b/01.png", folder / "a/00.png")
    with pytest.raises(ValueError, match="have changed since this run was started"):
        train(run, resume=True)  # type: ignore[operator]
