"""Dynamic thresholding against diffusers' DDIM, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.diffusion.thresholding import dynamic_threshold, thresholded
from tests.support.peers import import_diffusers

SCHEDULE = NoiseSchedule(ScheduleConfig())


def network(x: Tensor, t: float) -> Tensor:
    """eps that drives estimates well out of [-1, 1]."""
    return torch.sin(3 * x) + 0.3 * math.cos(t / 200)


@pytest.mark.parametrize(("quantile", "most"), [(0.995, math.inf), (0.8, 1.5), (1.0, 1.0)])
def test_the_limit_by_hand(quantile: float, most: float) -> None:
    x = torch.linspace(-4, 3, 24, dtype=torch.float64).reshape(2, 3, 2, 2)
    found = thresholded(x, quantile, most)
    for one, result in zip(x, found, strict=True):
        s = torch.quantile(one.abs().flatten(), quantile).clamp(1, most)
        torch.testing.assert_close(result, one.clamp(-s, s) / s)
    assert found.abs().max() <= 1
    small = x / 10
    assert torch.equal(thresholded(small, quantile, most), small)  # s is at least 1


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_of_diffusers(prediction: str) -> None:
    diffusers = import_diffusers("DDIMScheduler")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        thresholding=True,
        dynamic_thresholding_ratio=0.9,
        sample_max_value=2.5,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, use_clipped_model_output=True).prev_sample
    table = build_table("ddim", SCHEDULE, 10, prediction=prediction)  # type: ignore[arg-type]
    guidance = [dynamic_threshold(0.9, most=2.5)]
    times = table.timesteps.tolist()
    found = sample(lambda x, row: network(x, times[row]), table, start, range(3), guidance=guidance)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)
    plain = sample(lambda x, row: network(x, times[row]), table, start, range(3))
    assert (plain - found).abs().max() > 0.1


def test_after_classifier_free_guidance() -> None:
    """The limit is that of the guided estimate; a learned variance is left alone."""
    table = build_table("ddpm", SCHEDULE, 6, guidance_scale=4.0, variance="learned")
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []

    def predict(x: Tensor, row: int) -> Tensor:
        base = network(x, float(table.timesteps[row]))
        both = torch.cat([base, 1.5 * base])
        return torch.cat([both, torch.full_like(both, 0.25)], dim=1)

    sample(
        predict,
        table,
        x,
        range(2),
        guidance=[dynamic_threshold(0.9)],
        on_step=lambda step: seen.append(step.denoised.clone()),
    )
    assert len(seen) == 6
    assert max(float(d.abs().max()) for d in seen) <= 1 + 1e-9
    u, v = (float(table.column(name)[0]) for name in "UV")
    base = network(x, float(table.timesteps[0]))
    guided = base + 4 * (1.5 * base - base)
    torch.testing.assert_close(seen[0], thresholded(u * x + v * guided, 0.9))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"quantile must be in \(0, 1\], got 0"):
        dynamic_threshold(0.0)
    with pytest.raises(ValueError, match=r"most must be at least 1, got 0.5; math.inf"):
        dynamic_threshold(most=0.5)
