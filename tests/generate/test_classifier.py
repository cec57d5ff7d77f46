"""`model.generate(classifier=...)`: which class, which models fit, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.checkpoint.guide import with_classifier
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.cli import main
from fastdiff.diffusion.gradients import loss_pull
from fastdiff.diffusion.sampling import Step
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.generate.facts import Facts, check
from fastdiff.generate.job import ClassJob, ImageToImageJob, InterpolationJob, SampleSettings
from fastdiff.generate.memory import Call, need_of
from fastdiff.generate.model import with_generate
from fastdiff.generate.recipe import read as read_recipe
from fastdiff.generate.session import Session
from fastdiff.models.classifier import Classifier
from tests.models.test_classifier import SMALL
from tests.support.tiny import UNET, randomize, tiny_model, tiny_pixel_model, tiny_unet

CONFIG = replace(SMALL, num_classes=4, sample_size=8)
OPTIONS: dict[str, Any] = {"steps": 3, "sampler": "ddim"}


def classifier_model(**change: Any) -> Model:
    """A classifier for the latents of `tiny_model`."""
    network = Classifier(change.pop("config", CONFIG)).eval()
    randomize(network, 5)
    fields: dict[str, Any] = {
        "layout": "bundle",
        "classifier": network,
        "schedule": ScheduleConfig(),
        "scale_factor": tiny_model().scale_factor,
        "image_size": 16,
        "image_channels": 1,
        "class_names": ("zero", "one", "two", "three"),
        "path": Path("guide"),
    }
    return Model(**{**fields, **change})


def unconditional(**change: Any) -> Model:
    network = tiny_unet(replace(UNET, num_classes=None, null_class=False))
    return tiny_model(denoiser=network, class_names=(), **change)


def test_a_conditional_model_is_guided_towards_the_class_of_each_image() -> None:
    model, guide = with_generate(tiny_model()), classifier_model()
    plain = model.generate(classes=[0, 1, 2], **OPTIONS)
    images = model.generate(classes=[0, 1, 2], classifier=guide, classifier_scale=2000, **OPTIONS)
    jobs = [result.job.settings for result in images]
    assert [job.classifier_class for job in jobs] == [0, 1, 2]
    assert {job.classifier_scale for job in jobs} == {2000.0}
    assert all((a.image - b.image).abs().max() > 0.01 for a, b in zip(images, plain, strict=True))
    (alone,) = model.generate(
        classes=1, seeds=1, classifier=guide, classifier_scale=2000, **OPTIONS
    )
    assert torch.equal(alone.image, images[1].image)


def test_a_scale_of_zero_is_the_model_without_it() -> None:
    model, guide = with_generate(tiny_model()), classifier_model()
    plain = model.generate(classes="two", **OPTIONS)
    zero = model.generate(classes="two", classifier=guide, classifier_scale=0, **OPTIONS)
    assert torch.equal(zero.tensor, plain.tensor)


def test_an_unconditional_model_leaves_the_class_to_the_classifier() -> None:
    model = with_generate(with_classifier(unconditional(), classifier_model()))
    images = model.generate(classes=["three", 1], classifier_scale=2500, **OPTIONS)
    assert [result.job.label for result in images] == [None, None]
    assert [result.job.settings.classifier_class for result in images] == [3, 1]
    same = model.generate(classifier_class="three", classifier_scale=2500, **OPTIONS)
    assert torch.equal(same[0].image, images[0].image)
    assert (images[0].image - images[1].image).abs().max() > 0.01
    with pytest.raises(ValueError, match="needs a class to pull towards, got none"):
        model.generate(**OPTIONS)
    with pytest.raises(ValueError, match="class 1 could only be the classifier's, which is 2"):
        model.generate(classes=1, classifier_class=2, **OPTIONS)
    with pytest.raises(ValueError, match="unknown class 'nine'; expected one of zero, one"):
        model.generate(classes="nine", **OPTIONS)


def test_an_unconditional_model_moves_between_two_classes_of_the_classifier() -> None:
    model = with_classifier(unconditional(), classifier_model())
    settings = SampleSettings(steps=3, sampler="ddim", classifier_scale=2500.0)

    def images(*jobs: Any) -> list[torch.Tensor]:
        return [result.image for result in fastdiff.generate(model, jobs)]

    frames = [
        InterpolationJob(label="one", to_label=3, at=at, settings=settings) for at in (0, 0.5, 1)
    ]
    first, middle, last = images(*frames)
    ends = images(*[ClassJob(label=label, settings=settings) for label in (1, 3)])
    assert torch.equal(first, ends[0])
    assert torch.equal(last, ends[1])
    assert min((middle - end).abs().max() for end in ends) > 0.01
    (result,) = fastdiff.generate(model, frames[1:2])
    assert torch.equal(result.image, middle)
    made, classifier_class = result.job, result.job.settings.classifier_class
    assert isinstance(made, InterpolationJob)
    assert (made.label, made.to_label, classifier_class) == (1, 3, None)
    assert check(made, Facts.of(model)) == made
    both = replace(settings, classifier_class=1)
    with pytest.raises(ValueError, match="class 3 could only be the classifier's, which is 1"):
        images(InterpolationJob(label=1, to_label=3, settings=both))
    with pytest.raises(ValueError, match="this model has no classes, got class 'one'"):
        check(replace(frames[0], settings=SampleSettings()), Facts.of(unconditional()))


def test_no_class_and_a_class_of_the_classifier() -> None:
    """A conditional model without its class, guided by the classifier alone."""
    model = with_generate(with_classifier(tiny_model(), classifier_model()))
    (result,) = model.generate(classifier_class=2, guidance_scale=1, **OPTIONS)
    assert result.job.label is None
    assert result.job.settings.classifier_class == 2


def test_between_two_classes_each_pulls_by_its_share() -> None:
    session = Session.of(with_classifier(tiny_model(), classifier_model()))
    x = torch.zeros(3, 8, 8)

    def shares(**change: Any) -> dict[int, float]:
        settings = SampleSettings(classifier_scale=2.0, **change.pop("settings", {}))
        job = InterpolationJob(label=1, to_label=3, settings=settings, **change)
        return {pull.label: pull.scale for pull in session.pulls(job, x)}

    assert shares(at=0.25) == {1: 1.5, 3: 0.5}
    assert shares(at=0.25, settings={"classifier_class": 2}) == {2: 2.0}


@pytest.mark.parametrize("kind", [ClassJob, ImageToImageJob, InterpolationJob])
def test_every_kind_of_job_is_guided(kind: type[Any]) -> None:
    model = with_classifier(tiny_model(), classifier_model())
    own: dict[str, Any] = {"image": torch.zeros(1, 16, 16)} if kind is ImageToImageJob else {}
    own |= {"to_label": 2, "at": 0.5} if kind is InterpolationJob else {}
    images = []
    for scale in (0.0, 3000.0):
        settings = SampleSettings(steps=3, classifier_scale=scale)
        (result,) = fastdiff.generate(model, [kind(label=1, settings=settings, **own)])
        images.append(result.image)
    assert (images[0] - images[1]).abs().max() > 0.01


def test_a_classifier_is_loaded_from_a_folder(tmp_path: Path) -> None:
    save_bundle(classifier_model(), tmp_path / "guide")
    save_bundle(tiny_model(), tmp_path / "model")
    plain = fastdiff.load(tmp_path / "model")
    guided = fastdiff.load(tmp_path / "model", classifier=tmp_path / "guide")
    expected = guided.generate(classes=1, classifier_scale=3, **OPTIONS)
    found = plain.generate(classes=1, classifier=tmp_path / "guide", classifier_scale=3, **OPTIONS)
    assert torch.equal(found.tensor, expected.tensor)
    assert guided.weights_hash != plain.weights_hash
    assert "classifier" in str(guided)
    recipe = expected[0].recipe
    assert recipe["job"]["settings"]["classifier_class"] == 1
    assert recipe["weights"] == guided.weights_hash
    (default,) = guided.generate(classes=1, **OPTIONS)
    assert default.job.settings.classifier_scale == 1.0


def test_a_loss_of_the_user_guides_every_image() -> None:
    """The shipped model's latents, pulled through the denoiser to a mean of 0.3."""
    model, means, steps = fastdiff.load("digits"), [], list[Step]()

    def off_centre(x0: torch.Tensor) -> torch.Tensor:
        return (x0.mean(dim=(1, 2, 3)) - 0.3).square() * 64

    for pulls in ((), (loss_pull(off_centre, 3.0),)):
        (result,) = model.generate(
            classes=3, pulls=pulls, steps=8, sampler="ddim", on_step=steps.append
        )
        means.append(float(steps[-1].denoised.mean()))
    assert abs(means[1] - 0.3) < 0.5 * abs(means[0] - 0.3)
    assert result.recipe["guided_by"] == ["off_centre on x0, scale 3"]
    with pytest.raises(ValueError, match="guided by functions that no recipe contains"):
        read_recipe(result.recipe)


def test_inference_mode_changes_no_image() -> None:
    """A model that is first used there can still be guided on x0 outside of it."""

    def bright(x0: torch.Tensor) -> torch.Tensor:
        return (x0 - 1).square().mean(dim=(1, 2, 3))

    def image(model: Any) -> torch.Tensor:
        (result,) = model.generate(classes=3, pulls=[loss_pull(bright, 50.0)], steps=2)
        return result.image

    model, other = fastdiff.load("digits"), fastdiff.load("digits")
    with torch.inference_mode():
        inside = image(other)
    assert torch.equal(inside, image(model))
    assert torch.equal(inside, image(other))
    (plain,) = model.generate(classes=3, steps=2)
    assert (inside - plain.image).abs().max() > 0.01


def test_all_classes_share_the_table_of_a_sampler() -> None:
    session = Session.of(with_classifier(tiny_model(), classifier_model()))
    first, second = [
        check(ClassJob(label=label, settings=SampleSettings(classifier_scale=scale)), session.facts)
        for scale, label in ((1.0, 1), (2.0, 2))
    ]
    one, two = first.settings, second.settings
    assert session.table(one) is session.table(two)
    assert session.table(one) is not session.table(replace(one, steps=4))


def test_a_model_without_a_denoiser_is_refused_before_the_classifier_is_opened(
    tmp_path: Path,
) -> None:
    save_bundle(tiny_model(denoiser=None, schedule=None, class_names=()), tmp_path / "model")
    message = "model contains no denoiser, so a classifier cannot guide it; leave classifier out"
    with pytest.raises(ValueError, match=message):
        fastdiff.load(tmp_path / "model", classifier=tmp_path / "missing")
    model = fastdiff.load(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        model.generate(classes=1, classifier=tmp_path / "missing")


def test_the_command_guides_and_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bundle(unconditional(), tmp_path / "model")
    save_bundle(classifier_model(), tmp_path / "guide")
    monkeypatch.chdir(tmp_path)
    words = ["sample", "--model", "model", "--steps", "3", "--count", "1", "--out", "out"]
    guide = ["--classifier", "guide", "--classifier-scale", "3000"]
    assert main([*words, *guide, "--classes", "one", "2"]) == 0
    assert {path.name for path in Path("out").glob("*-seed0.png")} == {
        "one-seed0.png",
        "two-seed0.png",
    }
    assert main(["sample", "--like", "out/one-seed0.png", "--out", "out"]) == 0
    assert "identical to out/one-seed0.png, bit for bit" in capsys.readouterr().out
    assert main([*words, "--classifier-scale", "2"]) != 0
    assert "give classifier= (--classifier PATH)" in capsys.readouterr().err


def test_memory_of_the_classifiers_gradient_is_estimated() -> None:
    """At 16 rows of 8 x 8, two convolutions' results of 256 channels are 0.5 MiB each."""
    wide = replace(CONFIG, model_channels=256, norm_groups=16)
    model = with_classifier(tiny_model(), classifier_model(config=wide))
    call = Call(device=torch.device("cpu"), dtype=torch.float32, count=8)
    work = {}
    for scale in (0.0, 1.0):
        settings = SampleSettings(steps=3, classifier_scale=scale)
        job = check(ClassJob(label=1, settings=settings), Facts.of(model))
        work[scale] = need_of([model], job, call, loaded=True).work
    assert work[1.0] - work[0.0] > 10 * 2**20


def test_a_recipe_without_a_classifier_is_as_before() -> None:
    (result,) = with_generate(tiny_model()).generate(classes=1, **OPTIONS)
    assert not [name for name in result.recipe["job"]["settings"] if "classifier" in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(CONFIG, in_channels=4)}, "channels: 4 for the classifier, 3 for the"),
        ({"config": replace(CONFIG, sample_size=16)}, "side of x: 16 for the classifier, 8 for"),
        ({"config": replace(CONFIG, num_classes=5), "class_names": ()}, "classes: 5 for the class"),
        ({"class_names": ("zero", "one", "two", "3")}, "names of the classes"),
        ({"scale_factor": 1.0}, "scale factor: 1.0 for the classifier, 0.8 for the denoiser"),
        ({"schedule": ScheduleConfig(kind="cosine")}, "the noise schedule differs"),
        ({"schedule": ScheduleConfig(num_timesteps=500)}, "the noise schedule differs"),
        ({"classifier": None}, "guide contains no noisy classifier; train one with"),
    ],
)
def test_a_classifier_of_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    guide = classifier_model(**change)
    with pytest.raises(ValueError, match=message):
        with_classifier(tiny_model(), guide)
    with pytest.raises(ValueError, match=message):
        with_generate(tiny_model()).generate(classes=1, classifier=guide, **OPTIONS)


def test_what_cannot_be_guided_is_refused() -> None:
    plain = with_generate(tiny_model())
    for option in ({"classifier_scale": 2.0}, {"classifier_class": 1}):
        with pytest.raises(ValueError, match="was loaded without a classifier, so classifier_scal"):
            plain.generate(classes=1, **option, **OPTIONS)
    with pytest.raises(ValueError, match="contains no denoiser"):
        with_classifier(classifier_model(), classifier_model())
    with pytest.raises(ValueError, match="classifier_scale must be a number >= 0, got -1"):
        SampleSettings(classifier_scale=-1.0)
    guided = with_generate(with_classifier(tiny_model(), classifier_model()))
    with pytest.raises(ValueError, match=r"takes images of 16 x 16, got 32 x 16 \(width x height"):
        guided.generate(classes=1, width=32, **OPTIONS)


def test_equal_schedules_may_be_written_differently() -> None:
    """Betas from 0.0001 to 0.02 are those of OpenAI's linear schedule for 1000 steps."""
    other = ScheduleConfig(kind="linear", rescale_ends=True)
    model = tiny_pixel_model(schedule=replace(other, rescale_ends=False))
    guide = classifier_model(
        schedule=other, config=replace(CONFIG, sample_size=16), scale_factor=1.0
    )
    assert with_classifier(model, guide).classifier is guide.classifier


def test_a_classifier_of_no_classes_of_the_model_stays_where_it_was() -> None:
    """The same guided model is used again, so that its networks are prepared once."""
    model, guide = with_generate(tiny_model()), classifier_model()
    model.generate(classes=1, classifier=guide, **OPTIONS)
    first = vars(model)["_guided_model"][1]
    model.generate(classes=2, classifier=guide, **OPTIONS)
    assert vars(model)["_guided_model"][1] is first
