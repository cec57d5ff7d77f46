"""The advice in error messages works: every row follows it, and the advised call succeeds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import nn

import fastdiff
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.save import save
from fastdiff.cli import main
from fastdiff.configs import from_dict, to_dict
from fastdiff.data import AugmentConfig, DataConfig
from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.losses import min_snr_weight
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.samplers.onestep import ddim
from fastdiff.diffusion.sampling import Slots, sample
from fastdiff.diffusion.schedules import (
    NoiseSchedule,
    ScheduleConfig,
    sigma_spacing,
    timestep_spacing,
)
from fastdiff.files import atomic_folder
from fastdiff.generate.job import (
    ClassJob,
    ControlSettings,
    InterpolationJob,
    SampleSettings,
    TextJob,
    frames_of,
)
from fastdiff.images import contact_sheet, read_image, read_recipe, save_png, to_uint8
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from fastdiff.models.mlp import MLP, MLPConfig
from fastdiff.models.network import network_family
from fastdiff.models.prompts import parse_prompt
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.training import AutoencoderRun, DiffusionRun, OptimizationConfig, OutputConfig

SCHEDULE = NoiseSchedule(ScheduleConfig())
ZERO_SNR = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
SMALL: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_depth": (0, 1),
    "norm_groups": 4,
}
AUTOENCODER = AutoencoderConfig(
    image_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4
)
STEPS, OUTPUT = OptimizationConfig(steps=1, batch_size=1), OutputConfig(folder="run")


class Row(NamedTuple):
    """A call that fails, what its message must contain, and the call that the message advises."""

    wrong: Callable[[Path], Any]
    message: str
    right: Callable[[Path], Any]


def unet(**changes: Any) -> UNet:
    return UNet(UNetConfig(**{**SMALL, "num_heads": 1, **changes}))


def run_unet(*, side: int = 8, context: torch.Tensor | None = None, **changes: Any) -> torch.Tensor:
    y = changes.pop("y", None)
    network = unet(**changes)
    found = network(torch.zeros(1, 1, side, side), torch.zeros(1), context=context, y=y)
    assert isinstance(found, torch.Tensor)
    return found


def diffusion_run(dropout: float, *, null_class: bool) -> DiffusionRun[Any]:
    config = UNetConfig(**SMALL, num_heads=1, num_classes=2, null_class=null_class)
    return DiffusionRun(model=config, optimization=STEPS, output=OUTPUT, class_dropout=dropout)


def sampled(scale: float, outputs: int) -> torch.Tensor:
    table = build_table("ddim", SCHEDULE, 2, guidance_scale=scale)
    return sample(lambda x, row: torch.zeros(outputs, 1), table, torch.zeros(2, 1), [0, 1])


def slots(*calls: str) -> Slots:
    found = Slots(1, (1,))
    table = build_table("ddim", SCHEDULE, 2)
    for call in calls:
        if call == "put":
            found.put(0, table, torch.zeros(1), 0)
        else:
            getattr(found, call)(0)
    return found


def command(*words: str) -> None:
    assert main(words) == 0


def picture(folder: Path, recipe: dict[str, Any] | None) -> Path:
    save_png(folder / "x.png", torch.zeros(1, 8, 8), recipe)
    return folder / "x.png"


def a_file(folder: Path) -> Path:
    (folder / "taken").write_text("")
    return folder / "taken"


def folder_at(path: Path) -> None:
    with atomic_folder(path):
        pass


def loaded(**options: Any) -> LoadOptions:
    return LoadOptions(**options)


ROWS: dict[str, Row] = {
    # diffusion
    "steps": Row(
        lambda _: build_table("ddim", SCHEDULE, 0),
        "20 to 50 are usual",
        lambda _: build_table("ddim", SCHEDULE, 20),
    ),
    "sampler": Row(
        lambda _: build_table("ddmi", SCHEDULE, 2),
        "expected one of .*ddim",
        lambda _: build_table("ddim", SCHEDULE, 2),
    ),
    "sampler option": Row(
        lambda _: build_table("plms", SCHEDULE, 2, eta=1.0),
        "it has none",
        lambda _: build_table("plms", SCHEDULE, 2),
    ),
    "eps without signal": Row(
        lambda _: build_table("ddim", ZERO_SNR, 2),
        "use prediction 'v' or 'x0', or spacing 'leading'",
        lambda _: [
            build_table("ddim", ZERO_SNR, 2, prediction="v"),
            build_table("ddim", ZERO_SNR, 2, prediction="x0"),
            build_table("ddim", ZERO_SNR, 2, spacing="leading"),
        ],
    ),
    "sampler without signal": Row(
        lambda _: build_table("heun", ZERO_SNR, 2, prediction="v"),
        "use 'ddim' or 'dpmpp-2m', or spacing 'leading'",
        lambda _: [
            build_table("ddim", ZERO_SNR, 2, prediction="v"),
            build_table("dpmpp-2m", ZERO_SNR, 2, prediction="v"),
            build_table("heun", ZERO_SNR, 2, prediction="v", spacing="leading"),
        ],
    ),
    "more steps than timesteps": Row(
        lambda _: build_table("ddim", SCHEDULE, 1001),
        "spacing 'karras' or 'exponential' allows more",
        lambda _: [
            build_table("ddim", SCHEDULE, 1001, spacing="karras"),
            build_table("ddim", SCHEDULE, 1001, spacing="exponential"),
        ],
    ),
    "steps_offset": Row(
        lambda _: build_table("ddim", SCHEDULE, 2, steps_offset=1),
        "steps_offset must be 0 .* it is for spacing 'leading'",
        lambda _: build_table("ddim", SCHEDULE, 2, steps_offset=1, spacing="leading"),
    ),
    "large steps_offset": Row(
        lambda _: timestep_spacing("leading", 2, 10, offset=5),
        "use a smaller offset or fewer steps",
        lambda _: [
            timestep_spacing("leading", 2, 10, offset=4),
            timestep_spacing("leading", 1, 10, offset=5),
        ],
    ),
    "respacing string": Row(
        lambda _: build_table("ddim", SCHEDULE, 20, spacing="10,15"),
        "set steps to 25",
        lambda _: build_table("ddim", SCHEDULE, 25, spacing="10,15"),
    ),
    "DDIM's stride": Row(
        lambda _: build_table("ddim", SCHEDULE, 999, spacing="ddim999"),
        "use '999'",
        lambda _: build_table("ddim", SCHEDULE, 999, spacing="999"),
    ),
    "start and stop": Row(
        lambda _: build_table("ddim", SCHEDULE, 2, start=3),
        "start=0 and stop=None take all steps",
        lambda _: build_table("ddim", SCHEDULE, 2, start=0, stop=None),
    ),
    "clamp": Row(
        lambda _: build_table("ddim", SCHEDULE, 2, clamp=0.0),
        "use 1 for images, None for no clamp",
        lambda _: [build_table("ddim", SCHEDULE, 2, clamp=c) for c in (1.0, None)],
    ),
    "eta": Row(lambda _: ddim([], eta=2.0), "0 adds no noise, 1 adds", lambda _: ddim([], eta=1.0)),
    "guidance scale": Row(
        lambda _: GuidanceConfig(scale=-1.0),
        "up to 1 means no guidance, 7.5 is usual",
        lambda _: [GuidanceConfig(scale=1.0), GuidanceConfig(scale=7.5)],
    ),
    "guidance rescale": Row(
        lambda _: GuidanceConfig(rescale=2.0),
        "Lin et al. use 0.7",
        lambda _: GuidanceConfig(rescale=0.7),
    ),
    "guidance interval": Row(
        lambda _: build_table("ddim", SCHEDULE, 2, guidance_interval=(0, 3)),
        "must end at 2 or earlier",
        lambda _: build_table("ddim", SCHEDULE, 2, guidance_interval=(0, 2)),
    ),
    "number of timesteps": Row(
        lambda _: ScheduleConfig(num_timesteps=1),
        "1000 is usual",
        lambda _: ScheduleConfig(num_timesteps=1000),
    ),
    "ends of the betas": Row(
        lambda _: ScheduleConfig(beta_start=0.5, beta_end=0.1),
        "DDPM uses 1e-4 and 0.02",
        lambda _: ScheduleConfig(beta_start=1e-4, beta_end=0.02),
    ),
    "rescaled ends": Row(
        lambda _: ScheduleConfig(rescale_ends=True, num_timesteps=20),
        "use more timesteps or a smaller beta_end",
        lambda _: [
            ScheduleConfig(rescale_ends=True, num_timesteps=100),
            ScheduleConfig(rescale_ends=True, num_timesteps=20, beta_end=0.01),
        ],
    ),
    "betas": Row(
        lambda _: NoiseSchedule(torch.zeros(4)),
        "a ScheduleConfig makes valid ones",
        lambda _: NoiseSchedule(ScheduleConfig(num_timesteps=4)),
    ),
    "respaced schedule": Row(
        lambda _: SCHEDULE.respaced([1]),
        r"timestep_spacing\(\) makes valid ones",
        lambda _: SCHEDULE.respaced(timestep_spacing("leading", 10, 1000)),
    ),
    "infinite sigma": Row(
        lambda _: sigma_spacing("karras", 5, 0.1, math.inf),
        "use spacing 'trailing'",
        lambda _: build_table("ddim", ZERO_SNR, 5, prediction="v", spacing="trailing"),
    ),
    "min-SNR gamma": Row(
        lambda _: min_snr_weight(torch.ones(1), "eps", gamma=0.0),
        "the paper uses 5",
        lambda _: min_snr_weight(torch.ones(1), "eps", gamma=5.0),
    ),
    "guided outputs": Row(
        lambda _: sampled(2.0, 2),
        "set guidance_scale=1 to sample without guidance",
        lambda _: sampled(1.0, 2),
    ),
    "full slot": Row(
        lambda _: slots("put", "put"),
        r"call remove\(0\) first",
        lambda _: slots("put", "remove", "put"),
    ),
    "empty slot": Row(
        lambda _: slots("row"), r"fill it with put\(\) first", lambda _: slots("put", "row")
    ),
    # models
    "two kinds of heads": Row(
        lambda _: unet(num_heads=1, head_dim=8),
        "give one of num_heads and head_dim",
        lambda _: [unet(num_heads=1), unet(num_heads=None, head_dim=8)],
    ),
    "depth without context": Row(
        lambda _: unet(attention_depth=(0, 2)),
        "set context_dim",
        lambda _: unet(attention_depth=(0, 2), context_dim=4),
    ),
    "superfluous context": Row(
        lambda _: run_unet(context=torch.zeros(1, 2, 4)),
        "context must be None",
        lambda _: run_unet(context=None),
    ),
    "missing classes": Row(
        lambda _: run_unet(num_classes=2),
        r"int64 class labels of shape \(1,\), got None; pass y=",
        lambda _: run_unet(num_classes=2, y=torch.zeros(1, dtype=torch.int64)),
    ),
    "size of a U-Net's input": Row(
        lambda _: run_unet(side=7, downsample_padding="asymmetric"),
        "positive multiples of 2, .* resize or pad the input",
        lambda _: run_unet(side=8, downsample_padding="asymmetric"),
    ),
    "coordinates of points": Row(
        lambda _: MLP(MLPConfig(width=8))(torch.zeros(1, 3), torch.zeros(1)),
        "use points with as many coordinates as the model was trained on",
        lambda _: MLP(MLPConfig(width=8))(torch.zeros(1, 2), torch.zeros(1)),
    ),
    "kind of a network": Row(
        lambda _: network_family("unett"),
        "expected one of .*unet",
        lambda _: network_family("unet"),
    ),
    "size of an image": Row(
        lambda _: Autoencoder(AUTOENCODER).encode(torch.zeros(1, 1, 15, 16)),
        "positive multiples of 2, .* resize, crop or pad",
        lambda _: Autoencoder(AUTOENCODER).encode(torch.zeros(1, 1, 16, 16)),
    ),
    "channels of an image": Row(
        lambda _: Autoencoder(AUTOENCODER).encode(torch.zeros(1, 3, 16, 16)),
        "convert it to 1 channel",
        lambda _: Autoencoder(AUTOENCODER).encode(torch.zeros(1, 1, 16, 16)),
    ),
    "overlap of tiles": Row(
        lambda _: Autoencoder(AUTOENCODER).decode_tiled(torch.zeros(1, 4, 8, 8), 4, 4),
        "a quarter of the tile is usual",
        lambda _: Autoencoder(AUTOENCODER).decode_tiled(torch.zeros(1, 4, 8, 8), 4, 1),
    ),
    "layers of a discriminator": Row(
        lambda _: PatchDiscriminator(DiscriminatorConfig(num_layers=3))(torch.zeros(1, 3, 16, 16)),
        "use fewer num_layers for small images",
        lambda _: PatchDiscriminator(DiscriminatorConfig(num_layers=2))(torch.zeros(1, 3, 16, 16)),
    ),
    "AND in a prompt": Row(
        lambda _: parse_prompt("cat AND dog"),
        r"write 'and', or \\AND for the word itself",
        lambda _: [parse_prompt("cat and dog"), parse_prompt(r"cat \AND dog")],
    ),
    "scheduled words": Row(
        lambda _: parse_prompt("[cat:dog:0.5]"),
        r"or \[cat:dog\\:0.5\] for the literal text",
        lambda _: parse_prompt(r"[cat:dog\:0.5]"),
    ),
    "nested brackets": Row(
        lambda _: parse_prompt("(" * 51),
        r"write \\\( for the character itself",
        lambda _: parse_prompt(r"\(" * 51),
    ),
    # files, images, configs
    "a file in place of a folder": Row(
        lambda folder: folder_at(a_file(folder)),
        "choose another name",
        lambda folder: folder_at(folder / "other"),
    ),
    "unknown field": Row(
        lambda _: from_dict(ScheduleConfig, {**to_dict(ScheduleConfig()), "kid": "linear"}),
        r"kid: unknown field \(known: kind, ",
        lambda _: from_dict(ScheduleConfig, {**to_dict(ScheduleConfig()), "kind": "linear"}),
    ),
    "whole numbers as pixels": Row(
        lambda _: to_uint8(torch.zeros(1, 2, 2, dtype=torch.int64)),
        r"expected floating-point images in \[-1, 1\]",
        lambda _: to_uint8(torch.zeros(1, 2, 2)),
    ),
    "no recipe": Row(
        lambda folder: read_recipe(picture(folder, None)),
        "give a PNG written by fastdiff",
        lambda folder: read_recipe(picture(folder, {"seed": 1})),
    ),
    "labels of a sheet": Row(
        lambda _: contact_sheet(torch.zeros(4, 1, 8, 8), ["a"], columns=2),
        "expected 2 row labels for 4 images",
        lambda _: contact_sheet(torch.zeros(4, 1, 8, 8), ["a", "b"], columns=2),
    ),
    "height of a picture": Row(
        lambda folder: read_image(picture(folder, None), height=0),
        "height must be 1 to 65535",
        lambda folder: read_image(picture(folder, None), height=1),
    ),
    # training
    "data without a path": Row(
        lambda _: DataConfig(source="folder"),
        "set path to your images",
        lambda _: DataConfig(source="folder", path="images"),
    ),
    "digits with a path": Row(
        lambda _: DataConfig(path="images"),
        "use source='folder' or source='shards'",
        lambda _: [DataConfig(source=kind, path="images") for kind in ("folder", "shards")],
    ),
    "augmentation": Row(
        lambda _: AugmentConfig(fill="white"),  # type: ignore[arg-type]
        "must be black, border or reflection",
        lambda _: [AugmentConfig(fill=fill) for fill in ("black", "border", "reflection")],
    ),
    "accumulation": Row(
        lambda _: OptimizationConfig(steps=1, batch_size=10, accumulate=4),
        "choose a batch_size of 4 times a whole number",
        lambda _: OptimizationConfig(steps=1, batch_size=12, accumulate=4),
    ),
    "dropped classes": Row(
        lambda _: diffusion_run(0.1, null_class=False),
        "set null_class=True or class_dropout=0",
        lambda _: [diffusion_run(0.1, null_class=True), diffusion_run(0.0, null_class=False)],
    ),
    "channels of a discriminator": Row(
        lambda _: AutoencoderRun(model=AUTOENCODER, optimization=STEPS, output=OUTPUT),
        "set discriminator image_channels to 1",
        lambda _: AutoencoderRun(
            model=AUTOENCODER,
            optimization=STEPS,
            output=OUTPUT,
            discriminator=DiscriminatorConfig(image_channels=1),
        ),
    ),
    # jobs
    "variation": Row(
        lambda _: ClassJob(variation=0.5),
        "give variation_seed",
        lambda _: ClassJob(variation=0.5, variation_seed=1),
    ),
    "interpolation": Row(
        lambda _: InterpolationJob(label=1),
        "give one or more of to_seed, to_prompt, to_label and to_image",
        lambda _: [InterpolationJob(label=1, to_seed=1), InterpolationJob(label=1, to_label=2)],
    ),
    "frames": Row(
        lambda _: frames_of(InterpolationJob(to_seed=1, at=0.5), 3),
        "leave one of them out",
        lambda _: [
            frames_of(InterpolationJob(to_seed=1), 3),
            frames_of(InterpolationJob(to_seed=1, at=0.5), 1),
        ],
    ),
    "tile": Row(
        lambda _: SampleSettings(tile=4),
        "at least 8, .* 0 decodes images whole",
        lambda _: [SampleSettings(tile=8), SampleSettings(tile=0)],
    ),
    "control": Row(
        lambda _: TextJob(
            prompt="a cat",
            control="edges.png",
            controls=ControlSettings(control_start=0.5, control_end=0.5),
        ),
        r"leave the picture out \(None\) for a ControlNet that adds nothing",
        lambda _: TextJob(prompt="a cat", control=(None, "edges.png")),
    ),
    "strength of a control without a picture": Row(
        lambda _: TextJob(prompt="a cat", controls=ControlSettings(control_scale=0.5)),
        "need a picture; give control",
        lambda _: TextJob(
            prompt="a cat",
            control="edges.png",
            controls=ControlSettings(control_scale=0.5),
        ),
    ),
    "strength of upscaling": Row(
        lambda _: TextJob(prompt="a cat", upscale=0.5),
        "2 doubles both sides",
        lambda _: TextJob(prompt="a cat", upscale=2.0),
    ),
    # checkpoints, accelerate
    "loading options": Row(
        lambda _: loaded(num_heads=1, head_dim=8),
        "give one of num_heads and head_dim",
        lambda _: [loaded(num_heads=1), loaded(head_dim=8)],
    ),
    "layout": Row(
        lambda folder: save(fastdiff.load("digits"), folder / "x", layout="bundel"),
        "layout must be one of bundle",
        lambda folder: save(fastdiff.load("digits"), folder / "x", layout="bundle"),
    ),
    "strict": Row(
        lambda _: fastdiff.accelerate(nn.MultiheadAttention(8, 2), strict=True),
        "use strict=False to swap the others",
        lambda _: fastdiff.accelerate(nn.MultiheadAttention(8, 2), strict=False),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_advice_works(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    with pytest.raises((ValueError, OSError), match=row.message) as raised:
        row.wrong(tmp_path)
    assert "\n" not in str(raised.value) or name == "strict"
    row.right(tmp_path)


COMMANDS = {
    "samplers ddmi": ("did you mean ddpm or ddim?", "samplers ddim"),
    "samplers --spacing karas": ("did you mean karras?", "samplers --spacing karras"),
    "samplers --shedule cosine": ("did you mean --schedule?", "samplers --schedule cosine"),
    "samplers ddim --steps 2000": (
        "spacing 'karras' or 'exponential' allows more",
        "samplers ddim --steps 2000 --spacing karras",
    ),
    "samplrs": ("did you mean sample or samplers?", "samplers"),
    "info PICTURE --num-heads 4": ("leave it out", "info PICTURE"),
    "train autoencoder --preset digits": (
        "expected one of digits-autoencoder",
        "train autoencoder --preset digits-autoencoder --dry-run",
    ),
    "train autoencoder --preset digits-autoencoder --config x": (
        "leave one of them out",
        "train autoencoder --preset digits-autoencoder --dry-run",
    ),
}


@pytest.mark.parametrize("words", COMMANDS)
def test_advice_of_commands_works(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message, advised = COMMANDS[words]
    path = str(picture(tmp_path, {"seed": 1}))
    assert main(words.replace("PICTURE", path).split()) == 2
    said = capsys.readouterr().err
    assert re.search(re.escape(message), said, re.IGNORECASE), said
    command(*advised.replace("PICTURE", path).split())


def test_a_picture_that_another_program_saved_again_is_refused(tmp_path: Path) -> None:
    """The way out of `read_recipe`: the file as fastdiff wrote it, not one saved again."""
    path = picture(tmp_path, {"seed": 1})
    with Image.open(path) as opened:
        opened.save(tmp_path / "again.png")
    with pytest.raises(ValueError, match="not edited or re-saved by another program"):
        read_recipe(tmp_path / "again.png")
    assert read_recipe(path) == {"seed": 1}
