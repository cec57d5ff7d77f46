"""Caching between steps as a setting of jobs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastdiff
from fastdiff.diffusion.gradients import loss_pull
from fastdiff.generate.cost import evaluations
from fastdiff.generate.facts import Facts, check
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.recipe import from_json
from fastdiff.jobs.fields import from_default

SHORT = SampleSettings(steps=6)


def test_an_image_depends_on_its_own_job_alone() -> None:
    """Among images with other caches and none; and the tables of the sampler are shared."""
    model = fastdiff.load("digits")
    caches = [{}, {"cache": 3}, {"cache": 2, "cache_branch": 2}, {"cache": 3, "cache_center": 3}]
    jobs = [
        ClassJob(label=seed % 10, seed=seed, settings=replace(SHORT, **caches[seed % 4]))
        for seed in range(12)
    ]
    together = [result.image for result in fastdiff.generate(model, jobs)]
    for job, image in zip(jobs[:4], together, strict=False):
        (alone,) = fastdiff.generate(model, [job])
        assert torch.equal(alone.image, image)
    (plain,) = fastdiff.generate(model, [replace(jobs[1], settings=SHORT)])
    assert not torch.equal(plain.image, together[1])


def test_recipes_have_the_setting_only_where_it_is_used() -> None:
    model = fastdiff.load("digits")
    plain, cached = model.generate(seeds=[1], steps=2), model.generate(seeds=[1], steps=2, cache=2)
    assert not [name for name in plain[0].recipe["job"]["settings"] if "cache" in name]
    settings = cached[0].recipe["job"]["settings"]
    assert settings["cache"] == 2
    assert from_json(cached[0].recipe["job"]).settings.caching == cached[0].job.settings.caching
    assert from_default("cache", "3") == 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="cache must be at least 2, got 1"):
        SampleSettings(cache=1)
    with pytest.raises(ValueError, match="cache_branch and cache_center need cache"):
        SampleSettings(cache_branch=1)
    with pytest.raises(ValueError, match="cache_power needs cache_center"):
        SampleSettings(cache=3, cache_power=2.0)
    with pytest.raises(ValueError, match="cache_branch must be from 0 to 3 for this model, got 7"):
        fastdiff.load("digits").generate(cache=3, cache_branch=7)
    pulls = [loss_pull(lambda x0: x0.square().sum(dim=(1, 2, 3)))]
    with pytest.raises(ValueError, match="guidance by gradients"):
        fastdiff.load("digits").generate(cache=3, steps=2, pulls=pulls)


def test_a_job_costs_the_flops_of_its_evaluations() -> None:
    """Counted in a run of the job, by a hook on each convolution."""
    model = fastdiff.load("digits")
    facts = Facts.of(model)
    flops = 0

    def count(layer: torch.nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal flops
        weight = layer.get_parameter("weight")
        flops += 2 * out[:, 0].numel() * weight.numel() if out.ndim == 4 else 0

    def spent(**settings: object) -> tuple[int, float]:
        nonlocal flops
        flops = 0
        job = ClassJob(label=1, settings=SampleSettings(steps=8, sampler="ddim", **settings))  # type: ignore[arg-type]
        [*fastdiff.generate(model, [job])]
        return flops, evaluations(check(job, facts), facts)

    assert model.denoiser is not None
    for layer in model.denoiser.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    whole, rows = spent(guidance_scale=2.0)
    assert rows == 16
    for options in ({"cache": 2}, {"cache": 4, "cache_branch": 2}):
        reused, worth = spent(guidance_scale=2.0, **options)
        assert worth / rows == pytest.approx(reused / whole, abs=0.03)
