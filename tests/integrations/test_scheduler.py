"""`scheduler="fused"` against diffusers' own scheduler: the same images from the same noise."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.integrations import AccelerateError
from fastdiff.integrations.scheduler import objection
from fastdiff.kernels import SAMPLER_NOISE, philox_normal, record_backends
from tests.integrations import models
from tests.integrations.models import images, pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = {"skip_prk_steps": True, "steps_offset": 1}
DPM = "DPMSolverMultistepScheduler"
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 7),
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, 5),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}, 5),
    ("DDPMScheduler", {"clip_sample": False}, 4),
    ("DDPMScheduler", {"clip_sample": True}, 4),
    ("PNDMScheduler", PNDM, 6),
    ("EulerDiscreteScheduler", {}, 6),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, 5),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, 5),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 4),
    ("HeunDiscreteScheduler", {}, 3),
    (DPM, {}, 6),
    (DPM, {"use_karras_sigmas": True}, 5),
    (DPM, {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}, 16),
    (DPM, {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True}, 5),
]


def make(name: str, options: dict[str, Any]) -> Any:
    return getattr(models.import_diffusers(name), name)(**{**BETAS, **options})


def philox_in_place_of_torchs(monkeypatch: pytest.MonkeyPatch, module: str, seeds: Any) -> None:
    """Let diffusers draw the noise that ours draws, in the order of its steps."""
    rows = iter(range(1000))

    def noise(shape: Any, **others: Any) -> torch.Tensor:
        return philox_normal(seeds, tuple(shape[1:]), step=next(rows), stream=SAMPLER_NOISE)

    where = __import__(module, fromlist=["randn_tensor"])
    if hasattr(where, "randn_tensor"):
        monkeypatch.setattr(where, "randn_tensor", noise)


@pytest.mark.parametrize(("name", "options", "steps"), CASES, ids=str)
def test_same_images(
    name: str, options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make(name, options)
    pipe = pipeline(scheduler=scheduler)
    seeds = torch.arange(11, 13)
    generator = torch.Generator().manual_seed(11)
    module = type(scheduler).__module__
    with monkeypatch.context() as patch:
        philox_in_place_of_torchs(patch, module, seeds)
        wanted = images(pipe, steps, generator=generator)
    report = fastdiff.accelerate(pipe, scheduler="fused")
    assert report.count("scheduler") == (1, 0)
    assert isinstance(pipe.scheduler, type(scheduler).__mro__[-1])
    kind = type(make(name, options))
    assert isinstance(pipe.scheduler, kind)
    with record_backends() as ran:
        found = images(pipe, steps, generator=generator)
    assert "sampler_step" in ran
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    report.restore()
    assert type(pipe.scheduler) is kind
    with monkeypatch.context() as patch:
        philox_in_place_of_torchs(patch, module, seeds)
        assert torch.equal(images(pipe, steps, generator=generator), wanted)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [("DDIMScheduler", {"clip_sample": False}, 8), (DPM, {}, 8), ("EulerDiscreteScheduler", {}, 8)],
)
def test_entering_in_the_middle(name: str, options: dict[str, Any], steps: int) -> None:
    """Image-to-image starts at a later timestep, where multistep methods have no history."""
    results = []
    for fused in (False, True):
        scheduler = make(name, options)
        pipe = pipeline(scheduler=scheduler)
        if fused:
            fastdiff.accelerate(pipe, scheduler="fused")
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(3)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps[3:]:
            output = torch.tanh(scheduler.scale_model_input(x, t) + float(t) / 1000)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("DDPMScheduler", {"variance_type": "fixed_large"}, "adds noise in its last step"),
        ("UniPCMultistepScheduler", {}, "no sampler like UniPCMultistepScheduler"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "skip_prk_steps"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
    ],
)
def test_what_no_table_does_is_left(name: str, options: dict[str, Any], reason: str) -> None:
    pipe = pipeline(scheduler=make(name, options))
    with pytest.raises(AccelerateError, match=reason):
        fastdiff.accelerate(pipe, scheduler="fused", strict=True)
    report = fastdiff.accelerate(pipe, scheduler="fused")
    assert reason in str(report.left[-1].reason)
    assert type(pipe.scheduler).__module__.startswith("diffusers.")


def test_it_is_still_a_scheduler_of_diffusers(tmp_path: Path) -> None:
    pipe = pipeline()
    kind = type(pipe.scheduler)
    fastdiff.accelerate(pipe, scheduler="fused")
    assert fastdiff.accelerate(pipe, scheduler="fused").changed == 0
    assert inspect.signature(pipe.scheduler.step) == inspect.signature(
        make("DDIMScheduler", {}).step
    )
    pipe.save_pretrained(tmp_path)
    assert type(kind.from_pretrained(tmp_path / "scheduler")) is kind
    other = models.import_diffusers(DPM).DPMSolverMultistepScheduler
    assert type(other.from_config(pipe.scheduler.config)) is other
    again = copy.deepcopy(pipe.scheduler)
    again.set_timesteps(5)
    with pytest.raises(ValueError, match="use_clipped_model_output, got True"):
        again.step(torch.ones(1, 4), 1, torch.ones(1, 4), use_clipped_model_output=True)
    fused = make("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"})
    fastdiff.accelerate(pipeline(scheduler=fused), scheduler="fused")
    with pytest.raises(ValueError, match="divides 1000"):
        fused.set_timesteps(7)
    # a pipeline of Stable Diffusion takes the clamp out of a scheduler's config
    assert "noise estimate" in str(objection(make("DDIMScheduler", {"clip_sample": True})))
