"""Classes to images: the same seed gives the same bits; mixed jobs, and what is rejected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff.kernels
from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.sampling import sample
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.run import generate
from fastdiff.generate.session import Session
from fastdiff.generate.slerp import slerp
from fastdiff.models import layers
from fastdiff.models.unet import UNet
from tests.support import drawing
from tests.support.drawing import class_jobs
from tests.support.tiny import (
    SCALE_FACTOR,
    UNET,
    tiny_autoencoder,
    tiny_model,
    tiny_pixel_model,
    tiny_unet,
)

CLASSES, SEEDS = [0, 3, None, 1, 2, 3, 0], [11, 12, 13, 14, 15, 2**40 + 16, 17]
QUICK = SampleSettings(steps=3, guidance_scale=2.0)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(stored_hash="ab" * 32, path=Path("t"))


@pytest.fixture(scope="module")
def pixel_model() -> Model:
    unet = replace(UNET, in_channels=1, out_channels=1)
    return tiny_pixel_model(denoiser=tiny_unet(unet), image_channels=1)


def draw(
    model: Model,
    classes: Sequence[Any],
    seeds: Sequence[int],
    settings: SampleSettings,
    **options: Any,
) -> Tensor:
    return drawing.images(model, class_jobs(classes, seeds, settings), **options)


def assert_alone_equals_batch(
    model: Model, settings: SampleSettings, places: Sequence[int] = (0, 4, 6)
) -> None:
    """Each image alone, in a batch of 7 and in the batch turned around: the same bits."""
    with fastdiff.kernels.backend("reference"):
        latents = drawing.latents(model, class_jobs(CLASSES, SEEDS, settings))
        images = draw(model, CLASSES, SEEDS, settings)
        turned = draw(model, CLASSES[::-1], SEEDS[::-1], settings)
        assert torch.equal(images.flip(0), turned)
        for place in places:
            label, seed = [CLASSES[place]], [SEEDS[place]]
            alone = drawing.latents(model, class_jobs(label, seed, settings))
            assert torch.equal(alone[0], latents[place])
            assert torch.equal(draw(model, label, seed, settings)[0], images[place])
    assert len({image.numpy().tobytes() for image in images}) == len(SEEDS)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_same_bits_alone_and_at_any_place_of_seven(model: Model, sampler: str) -> None:
    assert_alone_equals_batch(model, replace(QUICK, sampler=sampler))


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7, "guidance_scale": 4.0},
        {"guidance_interval": (1, 2)},
        {"sampler": "ddim", "eta": 1.0, "spacing": "leading"},
        {"clamp": 1.0},
        {"tile": 8},
    ],
    ids=str,
)
def test_the_same_bits_with_every_setting(model: Model, change: dict[str, Any]) -> None:
    assert_alone_equals_batch(model, replace(QUICK, **change))


def test_the_same_bits_at_every_one_of_seven_places(model: Model) -> None:
    assert_alone_equals_batch(model, replace(QUICK, steps=2), range(7))


def test_the_same_bits_on_pixels(pixel_model: Model) -> None:
    assert_alone_equals_batch(pixel_model, replace(QUICK, clamp=1.0))


def test_the_same_bits_with_what_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases that norms add, one projection of the embedding, shortcuts as matrix products."""
    model = tiny_model()
    assert isinstance(model.denoiser, UNet)
    model.denoiser.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.denoiser.pack()
    monkeypatch.setattr(layers, "BIAS_IS_A_LAUNCH", ("cpu",))
    monkeypatch.setattr("fastdiff.runtime.prepare.prepare_layers", lambda *args, **options: None)
    served: list[str] = []
    for name in ("split_bias", "joined"):
        function = getattr(layers, name)

        def noted(*args: Any, name: str = name, function: Any = function) -> Any:
            found = function(*args)
            left = found[1] if name == "split_bias" else found
            return served.append(name if left is not None else f"not {name}") or found

        monkeypatch.setattr(layers, name, noted)
    assert_alone_equals_batch(model, QUICK)
    assert {"split_bias", "joined"} <= set(served)
    assert "not joined" not in served


def test_images_at_once_do_not_matter(model: Model) -> None:
    classes, seeds = [index % 4 for index in range(10)], list(range(10))
    whole = draw(model, classes, seeds, QUICK)
    for batch in (1, 3, 10):
        assert torch.equal(draw(model, classes, seeds, replace(QUICK, batch=batch)), whole)


def test_threads_do_not_matter_to_latents(model: Model) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(drawing.latents(model, class_jobs(CLASSES, SEEDS, QUICK)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_a_run_is_the_sampling_loop_and_the_decoder(model: Model) -> None:
    """Against the loop with UNet.forward and no blocks: catches a missed scale or a wrong class."""
    unet, autoencoder = model.denoiser, model.autoencoder
    assert unet is not None
    assert autoencoder is not None

    table = Session.of(model).table(replace(QUICK, sampler="dpmpp-2m"))

    def predict(x: Tensor, row: int) -> Tensor:
        steps = torch.full((3,), float(table.timesteps[row]))
        cond = unet(x, steps, y=torch.tensor([2, 0, 4]))
        return torch.cat([unet(x, steps, y=torch.full((3,), 4)), cond])

    with torch.no_grad():
        z = sample(predict, table, (3, 8, 8), [5, 6, 7])
        expected = autoencoder.decode(z / SCALE_FACTOR).clamp(-1, 1)
    images = draw(model, [2, 0, None], [5, 6, 7], QUICK)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-4)
    assert images.std() > 0.05


def test_classes_seeds_and_guidance_change_the_image(model: Model) -> None:
    def image(label: int | None = 0, seed: int = 5, **change: Any) -> Tensor:
        return draw(model, [label], [seed], replace(QUICK, **change))

    plain = image()
    for other in (image(1), image(None), image(seed=6), image(guidance_scale=3.0), image(steps=5)):
        assert (other - plain).abs().max() > 1e-4
    # Guidance of "no class" towards "no class" goes nowhere.
    none = image(None, guidance_scale=1.0)
    torch.testing.assert_close(image(None), none, rtol=1e-3, atol=1e-4)


def test_progress_counts_rows_of_all_jobs(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    settings = replace(QUICK, sampler="heun", batch=2)
    draw(model, [0] * 5, list(range(5)), settings, progress=lambda *now: seen.append(now))
    rows = 2 * 3 - 1
    assert [total for _, total in seen] == [5 * rows] * (3 * rows)
    assert [done for done, _ in seen] == [
        *range(2, 4 * rows + 1, 2),  # two passes of two samples
        *range(4 * rows + 1, 5 * rows + 1),
    ]


@pytest.mark.parametrize(
    ("classes", "seeds", "message"),
    [
        ([4], [0], "class must be from 0 to 3, got 4"),
        ([-1], [0], "class must be from 0 to 3, got -1"),
        ([True], [0], "label must be a whole number or text or None, got True"),
        ([0], [-1], "got -1"),
        ([0], [2**64], "from 0 to 2"),
        ([0], [1.5], "whole number"),
    ],
)
def test_classes_and_seeds_that_do_not_fit(
    model: Model, classes: list[Any], seeds: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(model, classes, seeds, QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "magic"}, "unknown sampler 'magic'; expected one of ddpm, ddim"),
        ({"spacing": "wide"}, "unknown spacing 'wide'"),
        ({"steps": -3}, "steps must be at least 1, got -3"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"eta": -1.0}, "eta must be a number >= 0"),
        ({"clamp": 0.0}, "clamp must be positive"),
        ({"guidance_scale": math.nan}, "guidance scale must be a finite number"),
        ({"guidance_rescale": 2.0}, "guidance rescale must be in"),
        ({"guidance_interval": (3, 3)}, "guidance interval must be steps"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleSettings(**change)


def test_a_model_without_classes_is_not_guided() -> None:
    unet = replace(UNET, num_classes=None, null_class=False)
    model = tiny_model(denoiser=tiny_unet(unet), class_names=())
    with pytest.raises(ValueError, match="has no classes, so it cannot be guided; set guidance_sc"):
        draw(model, [None], [0], QUICK)
    plain = replace(QUICK, guidance_scale=1.0)
    with pytest.raises(ValueError, match="has no classes, got class 1; leave it out"):
        draw(model, [1], [0], plain)
    image = draw(model, [None], [0], plain)
    assert image.isfinite().all()
    left_open = ClassJob(settings=SampleSettings(steps=3))  # guidance is off by default here
    assert torch.equal(drawing.images(model, [left_open]), image)


def test_a_network_that_returns_nan_is_named(model: Model) -> None:
    broken = tiny_unet()
    broken.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity at step 0"):
        draw(tiny_model(denoiser=broken), [0], [0], QUICK)
    decoder = tiny_autoencoder()
    decoder.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="got NaN or infinity from the decoder"):
        draw(tiny_model(autoencoder=decoder), [0], [0], QUICK)


def test_an_autoencoder_alone_does_not_sample() -> None:
    with pytest.raises(ValueError, match="contains only an autoencoder"):
        draw(tiny_model(denoiser=None, schedule=None, class_names=()), [0], [0], QUICK)


def test_embeddings_are_computed_once_per_class(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    embed = UNet.embed

    def counted(self: UNet, t: Tensor, y: Tensor | None = None, added: Any = None) -> Tensor:
        calls.append(tuple(t.shape))
        return embed(self, t, y, added)

    monkeypatch.setattr(UNet, "embed", counted)
    draw(tiny_model(), [0, 1, 0, 1, 0], list(range(5)), replace(QUICK, steps=6))
    assert calls == [(6,)] * 3  # classes 0 and 1 and the null class, all six timesteps at once


def test_guidance_up_to_1_is_none_at_half_the_cost(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in diffusers: 0 does not drop the condition."""
    rows: list[int] = []
    body = UNet.body

    def counted(self: UNet, x: Tensor, *rest: Any) -> Tensor:
        rows.append(len(x))
        return body(self, x, *rest)

    monkeypatch.setattr(UNet, "body", counted)
    found, cost = {}, {}
    for scale in (0.0, 0.5, 1.0, 1.5):
        rows.clear()
        settings = replace(QUICK, guidance_scale=scale)
        found[scale] = draw(model, [index % 4 for index in range(16)], range(16), settings)
        cost[scale] = sum(rows)
    assert torch.equal(found[0.0], found[1.0])
    assert torch.equal(found[0.5], found[1.0])
    assert not torch.equal(found[1.5], found[1.0])
    assert cost[0.0] == cost[1.0] == cost[1.5] // 2
    assert not torch.equal(found[0.0][0], found[0.0][1])


def test_any_mix_comes_in_order_and_alone_the_same(model: Model) -> None:
    """Jobs of other samplers, steps and sizes, with and without guidance, share the slots."""
    jobs = [
        ClassJob(
            label=index % 4,
            seed=index,
            height=16 + 8 * (index % 2),
            width=16,
            settings=SampleSettings(
                steps=1 + 5 * (index % 3),
                sampler=["ddim", "dpmpp-2m", "euler-ancestral"][index % 3],
                guidance_scale=[1.0, 3.0][index % 2],
            ),
        )
        for index in range(12)
    ]
    results = list(generate(model, iter(jobs), batch=5))
    assert [result.job.seed for result in results] == list(range(12))
    for job, result in zip(jobs, results, strict=True):
        assert torch.equal(drawing.images(model, [job])[0], result.image)


def test_images_that_are_decoded_in_tiles_share_a_run_with_others(model: Model) -> None:
    """Latents of 12 x 12, whole, in tiles of 8 or 9: each image has the bits that it has alone."""
    jobs = [
        ClassJob(label=1, seed=seed, height=24, width=24, settings=replace(QUICK, tile=tile))
        for seed, tile in enumerate([0, 0, 8, 9, 8, 9, 0])
    ]
    results = [result.image for result in generate(model, jobs)]
    for job, image in zip(jobs, results, strict=True):
        assert torch.equal(drawing.images(model, [job])[0], image)
    whole = replace(jobs[2], settings=replace(QUICK, tile=0))
    assert not torch.equal(drawing.images(model, [whole])[0], results[2])


def test_jobs_are_taken_as_there_is_room(model: Model) -> None:
    taken: list[int] = []

    def endless() -> Any:
        for seed in range(10**9):
            taken.append(seed)
            yield ClassJob(label=0, seed=seed, settings=QUICK)

    results = generate(model, endless(), batch=2)
    assert [next(results).job.seed for _ in range(9)] == list(range(9))
    assert len(taken) <= 9 + 2 * 2 + 8


def test_a_job_that_does_not_fit_ends_the_run_after_those_before_it(model: Model) -> None:
    jobs = [ClassJob(label=label, seed=0, settings=QUICK) for label in (0, 1, 9, 2)]
    results = generate(model, jobs, batch=1)
    with pytest.raises(ValueError, match="class must be from 0 to 3, got 9"):
        list(results)


def test_variations_lie_between_two_seeds(model: Model) -> None:
    def image(**change: Any) -> Tensor:
        return drawing.images(model, [ClassJob(label=0, seed=1, settings=QUICK, **change)])[0]

    ends = image(), drawing.images(model, [ClassJob(label=0, seed=2, settings=QUICK)])[0]
    assert torch.equal(image(variation_seed=2, variation=0.0), ends[0])
    torch.testing.assert_close(
        image(variation_seed=2, variation=1.0), ends[1], rtol=1e-4, atol=1e-4
    )
    small, middle = image(variation_seed=2, variation=0.1), image(variation_seed=2, variation=0.5)
    assert 0 < (small - ends[0]).norm() < (middle - ends[0]).norm()
    for change, message in (
        ({"variation": 0.5}, "give variation_seed"),
        ({"variation": 1.5, "variation_seed": 1}, "must be in"),
        ({"variation_seed": -1}, "seed must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassJob(**change)


def test_slerp_keeps_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    b *= a.norm() / b.norm()
    for share in (0.0, 0.25, 0.5, 1.0):
        mixed = slerp(a, b, share)
        assert float(mixed.norm()) == pytest.approx(float(a.norm()), rel=1e-12)
        angle = torch.arccos((mixed * a).sum() / a.norm() ** 2)
        whole = torch.arccos((b * a).sum() / a.norm() ** 2)
        assert float(angle) == pytest.approx(share * float(whole), abs=1e-6)
    assert torch.equal(slerp(a, a, 0.3), torch.lerp(a, a, 0.3))
