"""Files of noisy classifiers: OpenAI's are recognised and read strictly; bundles contain them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.guide import with_classifier
from fastdiff.checkpoint.layouts import openai_classifier as layout
from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.checkpoint.layouts.diffusers.write import save_diffusers
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Loading, recognise
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.weights import Place, Weights
from fastdiff.cli import main
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.classifier import Classifier, ClassifierConfig
from fastdiff.models.presets import CLASSIFIERS
from tests.checkpoint.layouts import openai_classifier
from tests.models.test_classifier import SMALL, VARIANTS
from tests.support import tiny
from tests.support.tiny import randomize

SAID: dict[str, Any] = {"head_dim": 32, "norm_groups": 16, "schedule": "linear"}


def classifier(config: ClassifierConfig = SMALL) -> Classifier:
    network = Classifier(config).eval()
    randomize(network, 0)
    return network


def published_file(folder: Path, network: Classifier, **change: Tensor | None) -> Path:
    """A file as OpenAI's: torch.save of a state dict. change: other values; None removes."""
    path = folder / "classifier.pt"
    state = openai_classifier(network.state_dict(), network.config.pool)
    state |= {key.replace("__", "."): value for key, value in change.items()}  # type: ignore[misc]
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_with_the_published_names_is_read(name: str, tmp_path: Path) -> None:
    size = {} if VARIANTS[name].get("pool", "attention") == "attention" else {"image_size": 16}
    network = classifier(replace(SMALL, **VARIANTS[name]))
    model = fastdiff.load(published_file(tmp_path, network), **SAID, **size)
    assert model.layout == "guided-diffusion-classifier"
    assert model.denoiser is None
    assert model.classifier is not None
    assert model.classifier.config == network.config
    assert (model.image_size, model.image_channels) == (16, 3)
    for key, value in network.state_dict().items():
        assert torch.equal(model.classifier.state_dict()[key], value), key


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name.startswith("adm")])
def test_configs_of_the_published_files_follow_from_their_shapes(name: str) -> None:
    with torch.device("meta"):
        state = Classifier(CLASSIFIERS[name]).state_dict()
    shapes = {key: tuple(t.shape) for key, t in openai_classifier(state, "attention").items()}
    assert layout.classifier_config(shapes, Loading()) == CLASSIFIERS[name]
    size, schedule = layout.PUBLISHED[
        CLASSIFIERS[name].model_channels,
        CLASSIFIERS[name].channel_mult,
        CLASSIFIERS[name].num_res_blocks,
    ]
    assert size == CLASSIFIERS[name].sample_size
    assert schedule.kind == ("cosine" if size == 64 else "linear")


def test_a_published_architecture_leaves_nothing_undecided() -> None:
    with torch.device("meta"):
        network = Classifier(CLASSIFIERS["adm-imagenet64"])
    state = openai_classifier(network.state_dict(), "attention")
    path = Path("64x64_classifier.pt")
    places = {key: Place(path, 0, torch.half, tuple(t.shape)) for key, t in state.items()}
    loading = Loading(options=LoadOptions(strict=True), device="meta")
    weights = Weights(path, places)
    assert recognise(weights) is layout.LAYOUT
    model = layout.LAYOUT.open(weights, loading)
    assert model.schedule == ScheduleConfig(kind="cosine")
    assert model.assumed.keys() == {"head_dim", "qkv_order", "schedule"}
    assert model.image_size == 64


def test_an_unknown_architecture_lists_what_it_guesses(tmp_path: Path) -> None:
    path = published_file(tmp_path, classifier(replace(SMALL, norm_groups=32)))
    with pytest.raises(ValueError, match="determines qkv_order: legacy, new; schedule: linear, "):
        fastdiff.load(path, strict=True, head_dim=32)


def test_guesses_about_the_classifier_of_a_model_are_listed_or_refused(tmp_path: Path) -> None:
    network = classifier(replace(SMALL, norm_groups=32, head_dim=64, channel_mult=(1, 2, 4)))
    guide = published_file(tmp_path, network)
    config = replace(tiny.UNET, num_classes=7)
    model = tiny.tiny_pixel_model(
        denoiser=tiny.tiny_unet(config), schedule=ScheduleConfig(kind="cosine"), class_names=()
    )
    save_bundle(model, tmp_path / "model")
    loaded = fastdiff.load(tmp_path / "model", classifier=guide)
    assert loaded.schedule == ScheduleConfig(kind="cosine"), "a guess does not contradict it"
    names = ["classifier head_dim", "classifier qkv_order", "classifier schedule"]
    assert list(loaded.assumed) == names
    again = with_classifier(loaded, fastdiff.load(guide, schedule="cosine"))
    assert list(again.assumed) == names[:2]
    (line,) = loaded.assumed_lines(flags=True)
    assert "classifier --head-dim 64 (or 16, 32, 64, or num_heads)" in line
    with pytest.raises(ValueError, match="noise schedule differs"):
        with_classifier(loaded, fastdiff.load(guide, schedule="linear"))
    with pytest.raises(ValueError, match=r"determines head_dim.* load FOLDER as the classifier"):
        fastdiff.load(tmp_path / "model", classifier=guide, strict=True)
    words = ["--head-dim", "64", "--qkv-order", "legacy", "--schedule", "cosine"]
    assert main(["convert", str(guide), str(tmp_path / "guide"), "--to", "bundle", *words]) == 0
    fastdiff.load(tmp_path / "model", classifier=tmp_path / "guide", strict=True)


def test_an_image_size_other_than_that_of_the_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be 16 for these positions, got 32; leave it out"):
        fastdiff.load(published_file(tmp_path, classifier()), **SAID, image_size=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra__weight": torch.zeros(1)}, "extra.weight is unknown"),
        ({"time_embed__2__bias": None}, "time_embed.2.bias is missing"),
        (
            {"out__2__c_proj__weight": torch.zeros(7, 9, 1)},
            r"c_proj.weight has shape \(7, 9\), exp",
        ),
        ({"input_blocks__1__0__in_layers__2__weight": torch.zeros(48, 32, 3, 3)}, "equal levels"),
        ({"input_blocks__3__1__qkv__weight": torch.zeros(96, 32, 1)}, "form none"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = published_file(tmp_path, classifier(), **change)
    with pytest.raises(ValueError, match=message) as error:
        fastdiff.load(path, **SAID)
    assert "\n" not in str(error.value)


def test_shapes_that_fit_several_architectures_are_refused(tmp_path: Path) -> None:
    """Without attention in the blocks, equal widths do not tell where a level ends."""
    config = replace(SMALL, channel_mult=(1, 1), num_res_blocks=1, attention_depth=(0, 0))
    path = published_file(tmp_path, classifier(config))
    with pytest.raises(ValueError, match="1 levels of 3 blocks or 2 levels of 1 blocks"):
        fastdiff.load(path, **SAID)


def model_of(network: Classifier) -> Model:
    return Model(
        layout="bundle",
        classifier=network,
        schedule=ScheduleConfig(kind="cosine"),
        scale_factor=0.7,
        image_size=32,
        image_channels=1,
        class_names=tuple("abcdefg"),
    )


def test_a_bundle_contains_a_classifier(tmp_path: Path) -> None:
    model = model_of(classifier())
    stored_hash = save_bundle(model, tmp_path / "b")
    loaded = fastdiff.load(tmp_path / "b")
    assert loaded.weights_hash == stored_hash
    assert loaded.classifier is not None
    assert loaded.classifier.config == SMALL
    for key, value in model.classifier.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(loaded.classifier.state_dict()[key], value), key
    assert (loaded.scale_factor, loaded.class_names) == (0.7, tuple("abcdefg"))
    assert "7 classes" in str(loaded)
    with pytest.raises(ValueError, match="a classifier, which guides a denoiser; load the denoise"):
        loaded.generate()


def test_bundles_without_classifiers_are_stored_as_before(tmp_path: Path) -> None:
    """The hash of a shipped bundle covers its config, which must not get new fields."""
    save_bundle(load_bundle("digits"), tmp_path / "digits")
    stored = json.loads((tmp_path / "digits" / "config.json").read_text())["model"]
    assert "classifier" not in stored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": None}, "a classifier needs the schedule it was trained with"),
        ({"class_names": ["a"]}, "the classifier has 7 classes, got 1 class_names"),
        ({"kind": "classifier"}, "kind must be that of a denoiser, got 'classifier'"),
        (
            {"classifier": None},
            "expected an autoencoder, a unet, a classifier or a clip, got neither",
        ),
    ],
)
def test_bundles_that_contradict_themselves_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_bundle(model_of(classifier()), tmp_path / "b")
    path = tmp_path / "b" / "config.json"
    data = json.loads(path.read_text())
    data["model"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_bundle(tmp_path / "b")


def test_a_diffusers_folder_cannot_contain_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot contain a noisy classifier; save a bundle"):
        save_diffusers(model_of(classifier()), tmp_path / "d")


def test_the_weights_hash_covers_the_classifier() -> None:
    network = classifier()
    before = model_of(network).weights_hash
    with torch.no_grad():
        network.time_embed[0].bias[0] += 1
    assert model_of(network).weights_hash != before
