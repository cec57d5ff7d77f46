"""Training on captions: a text transformer and a denoiser by one loss, saved, resumed, sampled."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.checkpoint.layouts.diffusers.write import save_diffusers
from fastdiff.checkpoint.model import Model
from fastdiff.cli import main
from fastdiff.data import DataConfig
from fastdiff.data.emoji import SHIPPABLE
from fastdiff.data.scenes import make_scene
from fastdiff.evaluation import reference_of
from fastdiff.generate.job import SampleSettings, TextJob
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.text import encode_prompt
from fastdiff.models.text_transformer import TextTransformer
from fastdiff.models.unet import UNet
from fastdiff.training import (
    TRAINING_PRESETS,
    AutoencoderLossConfig,
    AutoencoderRun,
    DenoiserLossConfig,
    DiffusionRun,
    PreviewConfig,
    TextConfig,
    train_autoencoder,
    train_diffusion,
)
from fastdiff.training.task import DiffusionTask
from fastdiff.training.text import Captions, Conditioned
from fastdiff.training.trainer import Trainer
from tests.training import runs

DATA = DataConfig(source="scenes", image_size=16, channels=3, scenes=12)
TEXT = TextConfig(layers=2, heads=2, tokens=24, vocabulary=320)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of scenes, barely trained."""
    folder = tmp_path_factory.mktemp("text") / "first"
    model = AutoencoderConfig(
        regularization="vq",  # latents without noise, which would hide what a caption says
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


def text_run(first: Path, folder: Path, **changes: Any) -> DiffusionRun[Any]:
    defaults: dict[str, Any] = {
        "model": runs.denoiser_model(2, num_classes=None, null_class=False, context_dim=16),
        "autoencoder": str(first),
        "data": DATA,
        "text": TEXT,
    }
    return runs.diffusion_run(Path(), folder, **{**defaults, **changes})


# --- captions -----------------------------------------------------------------------------------


def test_trained_and_prompted_tokens_are_the_same(first: Path, tmp_path: Path) -> None:
    task = DiffusionTask(text_run(first, tmp_path / "run"))
    assert task.captions is not None
    assert isinstance(task.network, Conditioned)
    encoder = task.captions.encoder(task.network.encoder.eval())
    for text in (*task.captions.full[:4], "", "an unknown word"):
        ours = task.network.encoder.encode(task.captions.ids([text]))
        torch.testing.assert_close(
            ours, encode_prompt([encoder], text, emphasis=False).tokens, rtol=0, atol=1e-6
        )


def test_captions_are_drawn_in_their_shares() -> None:
    captions = Captions(
        [("full one", "b", "c"), ("only",)], dataclasses.replace(TEXT, full_caption=0.5)
    )
    count = 6000
    uniform = torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros(count, dtype=torch.bool)
    drawn = captions.drawn(torch.zeros(count, dtype=torch.int64), uniform, kept)
    for text, share in (("full one", 0.5), ("b", 0.25), ("c", 0.25)):
        found = (drawn == captions.ids([text])).all(1).double().mean().item()
        assert found == pytest.approx(share, abs=4 * (0.25 / count) ** 0.5)
    alone = captions.drawn(torch.ones(count, dtype=torch.int64), uniform, kept)
    assert bool((alone == captions.ids(["only"])).all())
    dropped = captions.drawn(torch.tensor([0, 1]), uniform[:2], torch.tensor([True, False]))
    assert torch.equal(dropped, captions.ids(["", "only"]))


def test_long_captions_are_cut() -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 captions are cut to 24 tokens.* longest has 32:"):
        captions = Captions([("red " * 30, "red " * 22)], TEXT)
    (ids,) = captions.ids(["red " * 30]).tolist()
    assert len(ids) == 24
    assert ids[-1] == captions.tokenizer.eos_token_id
    assert captions.tokenizer.pad_token_id not in ids


def test_a_batch_has_the_captions_of_its_images(first: Path, tmp_path: Path) -> None:
    task = DiffusionTask(text_run(first, tmp_path / "run", class_dropout=0.0))
    assert task.captions is not None
    batch = task.batch(3)
    indices, _ = task.batches.places(3)
    expected = task.captions.ids([make_scene(0, index).caption for index in indices.tolist()])
    assert torch.equal(batch["ids"], expected)
    rows = torch.tensor([2, 0])
    assert torch.equal(task.batch(3, rows)["ids"], expected[rows])
    empty = DiffusionTask(text_run(first, tmp_path / "run", class_dropout=1.0))
    assert empty.captions is not None
    assert torch.equal(empty.batch(3)["ids"], empty.captions.ids([""] * 4))


# --- runs ---------------------------------------------------------------------------------------


def test_one_loss_trains_both(first: Path, tmp_path: Path) -> None:
    """The gradient of each parameter is that of the joint loss, by autograd on the plain sum."""
    run = text_run(first, tmp_path / "run")
    task = DiffusionTask(run)
    trainer = Trainer(task, run)
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    for _ in range(3):
        trainer.step()
    moved = {n for n, v in task.network.state_dict().items() if not torch.equal(v, before[n])}
    assert {"encoder.token_embedding.weight", "encoder.layers.0.attention.qkv.weight"} <= moved
    assert "denoiser.conv_out.weight" in moved
    shadow = trainer.ema.network.state_dict()
    assert not torch.equal(
        shadow["encoder.token_embedding.weight"],
        task.network.state_dict()["encoder.token_embedding.weight"],
    )


def test_a_resumed_run_is_the_uninterrupted_one(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text_run(first, tmp_path / "whole")
    train_diffusion(whole)
    cut = runs.with_output(whole, folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        runs.signal_at(patch, DiffusionTask, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_diffusion(cut)
    train_diffusion(cut, resume=True)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert DiffusionRun.from_json(json.loads((tmp_path / "cut/config.json").read_text())) == cut


def test_the_bundle_makes_the_previews_images(first: Path, tmp_path: Path) -> None:
    """What is exported reads prompts and, for equal captions and seeds, returns equal images."""
    run = text_run(
        first, tmp_path / "run", preview=PreviewConfig(count=3, steps=3, guidance_scale=2)
    )
    train_diffusion(run)
    task = DiffusionTask(run)
    assert task.captions is not None
    Trainer(task, run)
    bundle = load_bundle(tmp_path / "run")
    (encoder,) = bundle.text_encoders
    assert isinstance(encoder.model, TextTransformer)
    assert bundle.denoiser is not None
    averaged = Conditioned(bundle.denoiser, encoder.model)
    task.latents.scale_factor = bundle.scale_factor
    expected = task.sample(averaged, range(3), [None] * 3)
    model = fastdiff.load(tmp_path / "run")
    settings = SampleSettings(sampler="ddim", steps=3, guidance_scale=2.0)
    jobs = [
        TextJob(prompt=text, seed=seed, settings=settings, height=16, width=16)
        for seed, text in enumerate(task.captions.examples(3))
    ]
    made = torch.stack([result.image for result in fastdiff.generate(model, jobs)])
    torch.testing.assert_close(made.float(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(expected[0], expected[1])


def test_a_bundle_keeps_its_text_encoder(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_diffusion(text_run(first, tmp_path / "run"))
    model = load_bundle(tmp_path / "run")
    again = tmp_path / "again"
    assert save_bundle(model, again) == model.weights_hash
    assert main(["convert", str(again), str(tmp_path / "third"), "--to", "bundle"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert load_bundle(tmp_path / "third").weights_hash == model.weights_hash
    assert load_bundle(again, text_encoders=False).text_encoders == ()
    data = json.loads((again / "config.json").read_text())
    assert data["weights"].keys() == {
        *("autoencoder.safetensors", "unet.safetensors", "text_encoder.safetensors"),
        "tokenizer.json",
    }
    merges = json.loads((again / "tokenizer.json").read_text())
    (again / "tokenizer.json").write_text(json.dumps({"merges": merges["merges"][:-1]}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: sha256 is"):
        load_bundle(again)
    (again / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_bundle(again)


def test_the_command_makes_a_picture_from_a_prompt(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_diffusion(text_run(first, tmp_path / "run", preview=PreviewConfig(guidance_scale=3.0)))
    monkeypatch.chdir(tmp_path)
    prompt, other = "a red circle left of a (blue:1.2) square", "two squares"
    words = ["txt2img", prompt, other, prompt, "--model", "run", "--steps", "3", "--count", "2"]
    assert main([*words, "--out", "pictures"]) == 0
    recipes = {path: fastdiff.images.read_recipe(path) for path in Path("pictures").glob("*seed*")}
    jobs = sorted((made["job"]["prompt"], made["job"]["seed"]) for made in recipes.values())
    assert jobs == [(prompt, 0), (prompt, 1), (other, 0), (other, 1)]
    scales = {made["job"]["settings"]["guidance_scale"] for made in recipes.values()}
    assert scales == {3.0}, "the scale that the run was previewed with"
    assert fastdiff.images.read_recipe(Path("pictures/sheet.png"))["names"] == [prompt, other]
    again = ["txt2img", "--like", "pictures/two-squares-seed1.png", "--out", "again"]
    assert main(again) == 0, "the same picture, bit for bit"


@pytest.mark.filterwarnings("ignore:1 of 4 captions are cut to 24 tokens")
def test_it_learns_which_caption_belongs_to_which_picture(first: Path, tmp_path: Path) -> None:
    """After 50 steps on four pictures their own captions explain noise, those of others do not.

    At t = 900 hardly anything is left of a picture, so the caption has to say what it was.
    Measured: 0.25 with a picture's own caption, 0.87 to 0.96 with those of others.
    """
    run = text_run(
        first,
        tmp_path / "run",
        data=dataclasses.replace(DATA, scenes=4),
        model=runs.denoiser_model(
            2,
            num_classes=None,
            null_class=False,
            context_dim=16,
            model_channels=16,
            attention_depth=(1, 1),
            dropout=0.0,
        ),
        optimization=runs.optimization(steps=400, batch_size=8, learning_rate=3e-3),
        loss=DenoiserLossConfig(timesteps="logit-normal", logit_mean=2.0),
        class_dropout=0.0,
    )
    task = DiffusionTask(run)
    trainer = Trainer(task, run)
    for _ in range(50):
        trainer.step()
    task.network.eval()
    assert task.captions is not None
    captions, (places, _) = task.captions.ids(task.captions.full), task.batches.places(0)
    x0, _ = task.latents.batch(0)
    noise = torch.randn(16, *x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((8,), 900.0)

    @torch.no_grad()
    def loss(away: int) -> float:
        """With the captions of pictures that are `away` places further."""
        ids = captions[(places + away) % 4]
        batches = [{"x0": x0, "noise": n, "t": t, "ids": ids} for n in noise]
        return sum(task.losses(batch, 0)[0]["unet"].item() for batch in batches) / 16

    assert loss(0) < 0.5 * min(loss(away) for away in (1, 2, 3))


@pytest.mark.parametrize("name", ["emoji", "scenes"])
def test_presets_belong_together(name: str) -> None:
    """Data, first stage and text; the model to be given away has at most 16 MB in fp16."""
    first, second = TRAINING_PRESETS[f"{name}-autoencoder"], TRAINING_PRESETS[f"{name}-text"]
    assert isinstance(first, AutoencoderRun)
    assert isinstance(second, DiffusionRun)
    assert DiffusionRun.from_json(second.to_json()) == second
    assert second.autoencoder == first.output.folder
    assert second.data == first.data
    assert second.model.in_channels == first.model.latent_channels
    assert second.data.styles == SHIPPABLE
    captions = Captions([("a red apple, noto style",)], second.text)
    largest = dataclasses.replace(
        captions.transformer(second.model.context_dim), vocab_size=second.text.vocabulary
    )
    with torch.device("meta"):
        parts = [Autoencoder(first.model), UNet(second.model), TextTransformer(largest)]
    numbers = sum(p.numel() for part in parts for p in part.parameters())
    assert 2 * numbers < 16e6


def test_diffusers_has_no_such_text_encoder(first: Path, tmp_path: Path) -> None:
    train_diffusion(text_run(first, tmp_path / "run"))
    model = fastdiff.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"save it as a bundle.*text_encoders=False"):
        save_diffusers(model, tmp_path / "no")
    bare = fastdiff.load(tmp_path / "run", text_encoders=False)
    save_diffusers(bare, tmp_path / "bare")
    assert not (tmp_path / "no").exists()


def test_evaluate_does_not_take_captions_for_digits() -> None:
    model = Model(layout="bundle", image_size=32, provenance={"facts": {"data": "scenes"}})
    with pytest.raises(ValueError, match=r"trained on scenes; make pictures .* fastdiff txt2img"):
        reference_of(model)


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": TextConfig()}, "need each other, got context_dim=16 and 0 text layers"),
        ({"model": runs.denoiser_model(2)}, "need each other, got context_dim=None and 2"),
        ({"autoencoder": ""}, "set autoencoder to the run of a first stage"),
        ({"init_from": "digits"}, "leave init_from out"),
        ({"data": DataConfig()}, "data source 'digits' has none; use emoji or scenes"),
        ({"text": dataclasses.replace(TEXT, heads=3)}, "multiple of text heads, got 16 and 3"),
    ],
)
def test_parts_that_do_not_fit(
    change: dict[str, Any], message: str, first: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        text_run(first, tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": -1}, "layers must be 0 or more"),
        ({"vocabulary": 200}, "at least 260, got 200"),
        ({"tokens": 2}, "tokens must be at least 3"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"full_caption": 1.5}, "full_caption must be 0 to 1"),
    ],
)
def test_wrong_text_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TEXT, **change)
