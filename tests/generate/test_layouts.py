"""Commands sample from all that `load` opens: OpenAI's files, LDM's classes, upsamplers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.cli import main
from fastdiff.generate.job import ClassJob
from fastdiff.images import read_image, read_recipe, save_png
from tests.checkpoint import layouts
from tests.checkpoint.test_open import openai_by_width
from tests.models.test_against_diffusers import ADM, VAE, peer_model, randn
from tests.support.diffusers_models import save_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what diffusers logs while the files are made
        code = main(f"{line} --device cpu".split())
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), captured.err

    return call


def openai_file(path: Path, **options: Any) -> None:
    unet = peer_model("UNet2DModel", ADM | options, torch.float32)
    torch.save(openai_by_width(unet.state_dict(), 2, 16, "legacy"), path)


def ldm_file(path: Path) -> None:
    """cin256: a table of ten classes and no class, a first stage."""
    unet = peer_model(
        "UNet2DConditionModel",
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64),
            "cross_attention_dim": 24,
            "attention_head_dim": 1,
            "in_channels": 4,
            "out_channels": 4,
        },
        torch.float32,
    )
    first = peer_model("AutoencoderKL", VAE, torch.float32)
    named = layouts.openai_unet(unet.state_dict(), 2)
    state = {f"model.diffusion_model.{key}": value for key, value in named.items()}
    named = layouts.ddpm(first.state_dict(), 2)
    state |= {f"first_stage_model.{key}": value for key, value in named.items()}
    state["cond_stage_model.embedding.weight"] = randn(11, 24, dtype=torch.float32)
    torch.save({"state_dict": state}, path)


OPENAI = "--head-dim 16 --image-size 16 --steps 3"


def test_openais_class_conditional_file(run: Run) -> None:
    """Learned variance, no null class: ddpm takes the network's own, guidance is off."""
    openai_file(Path("tiny.pt"))
    line = f"sample --model tiny.pt --classes 3 --count 2 --sampler ddpm {OPENAI}"
    code, out, err = run(line)
    assert (code, err) == (0, "")
    assert "2 of 16 x 16, ddpm, 3 steps weights" in out  # no guidance
    assert "assumed" in out
    assert "--prediction eps" in out
    recipe = read_recipe("out/class3-seed1.png")
    settings = recipe["job"]["settings"]
    assert (settings["guidance_scale"], settings["clamp"]) == (1.0, 1.0)
    assert recipe["load"] == {"head_dim": 16, "image_size": 16}
    code, out, err = run("sample --like out/class3-seed1.png")
    assert (code, err) == (0, "")
    assert "identical to out/class3-seed1.png, bit for bit" in out
    # The options of loading change the image, and are part of what is compared.
    code, out, err = run("sample --like out/class3-seed1.png --prediction v --out v")
    assert (code, "compared" in out) == (0, False)
    a, b = read_image("out/class3-seed1.png"), read_image("v/class3-seed1.png")
    assert (a - b).abs().max() > 0.1
    for more, message in (
        ("--classes 10", "unknown class '10'"),
        ("--classes none", "has no null class"),
        ("--guidance-scale 2", "without a null class, so it cannot be guided; set"),
    ):
        code, out, err = run(f"sample --model tiny.pt {OPENAI} {more}")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_the_variance_is_learned(run: Run) -> None:
    openai_file(Path("tiny.pt"))
    model = fastdiff.load("tiny.pt", head_dim=16, image_size=16)
    call: dict[str, Any] = {"classes": 3, "seeds": 1, "steps": 3, "sampler": "ddpm"}
    first = model.generate(**call).tensor
    assert model.denoiser is not None
    with torch.no_grad():
        model.denoiser.get_parameter("conv_out.bias")[3:] += 3
    assert not torch.equal(model.generate(**call).tensor, first)


def test_an_upsampler_enlarges_a_picture(run: Run) -> None:
    openai_file(Path("up.pt"), in_channels=6)
    code, out, err = run(f"sample --model up.pt --classes 1 {OPENAI}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert (
        "enlarges a small image, and none was given; pass image= (fastdiff sample --image FILE)"
        in err
    )
    for name, seed in (("a", 0), ("b", 1)):
        pixels = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
        save_png(f"{name}.png", pixels * 2 - 1)
    for name in ("a", "b"):
        line = f"sample --model up.pt --classes 1 --count 1 --image {name}.png {OPENAI}"
        assert run(f"{line} --out {name}")[0] == 0
    made = [read_image(f"{name}/class1-seed0.png") for name in ("a", "b")]
    assert made[0].shape == (3, 16, 16)
    assert (made[0] - made[1]).abs().max() > 0.05
    code, out, _ = run("sample --like a/class1-seed0.png")
    assert (code, "bit for bit" in out) == (0, True)
    # guided-diffusion's low resolution: bilinear, behind the channels of x
    model = fastdiff.load("up.pt", head_dim=16, image_size=16)
    small = read_image("a.png")
    large = torch.nn.functional.interpolate(small[None], (16, 16), mode="bilinear")[0]
    jobs = [ClassJob(label=1, image=image) for image in (small, large)]
    same = [result.image for result in fastdiff.generate(model, jobs)]
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-4)


def test_ldms_table_of_classes(run: Run) -> None:
    ldm_file(Path("cin"))
    code, out, err = run("sample --model cin --classes 2 none --count 1 --image-size 16 --steps 3")
    assert (code, err) == (0, "")
    assert "guidance 1.5" in out
    model = fastdiff.load("cin", image_size=16)
    call: dict[str, Any] = {"seeds": 0, "steps": 3}
    plain, guided, none = (
        model.generate(classes=label, guidance_scale=scale, **call).tensor
        for label, scale in ((2, 1.0), (2, 1.5), (None, 1.0))
    )
    assert (read_image("out/class2-seed0.png") - guided[0]).abs().max() < 1 / 127
    assert (guided - plain).abs().max() > 1e-3
    assert (none - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="class must be from 0 to 9, got 10"):
        model.generate(classes=10, **call)
    code, out, _ = run("sample --like out/class2-seed0.png")
    assert (code, "bit for bit" in out) == (0, True)
    # from an image too
    line = "img2img --image out/class2-seed0.png --label 5 --model cin --image-size 16 --steps 3"
    code, out, err = run(f"{line} --out i")
    assert (code, err) == (0, "")
    assert read_image("i/class2-seed0-seed0.png").shape == (3, 16, 16)


def test_info_and_reconstruct_on_a_diffusers_folder(run: Run, capsys: Any) -> None:
    folder = save_folder("sd1", Path())
    assert main(["info", str(folder)]) == 0
    assert "diffusers" in capsys.readouterr().out
    save_png("photo.png", torch.zeros(3, 64, 64))
    code, out, err = run(f"reconstruct photo.png --model {folder}")
    assert (code, err) == (0, "")
    assert "1 of 3 x 64 x 64, latents 4 x 8 x 8" in out
