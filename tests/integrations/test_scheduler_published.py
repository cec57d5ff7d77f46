"""Fused schedulers give the numbers that diffusers' own test suite expects of its schedulers.

Its toy loops, rewritten here: a sample of shape (4, 3, 8, 8) that counts up from 0 to 1, a
"network" that returns x t / (t + 1), and the sum and the mean of the absolute values at the end.
The numbers and tolerances are those of huggingface/diffusers, tests/schedulers/test_scheduler_*.py.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.test_scheduler_uses import fuse
from tests.support.peers import import_diffusers

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One published loop and its result."""

    scheduler: str
    total: float | None
    mean: float
    options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = 10
    """None: without `set_timesteps`, over every timestep of the training."""
    last: int | None = None
    """Noise is added and only that many timesteps are run."""
    scales: bool = False
    """The loop goes on from the scaled input, as those of the schedulers with sigmas do."""


DDIM, DDPM = {"clip_sample": True}, {"variance_type": "fixed_small", "clip_sample": True}
PNDM = {"skip_prk_steps": True}
DPM = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
HEUN, MULTISTEP = "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"
UNIPC, DEIS = "UniPCMultistepScheduler", "DEISMultistepScheduler"
SOLVER = {"solver_order": 2}
BH2 = {**SOLVER, "final_sigmas_type": "sigma_min"}
V = {"prediction_type": "v_prediction"}
VE = {"num_train_timesteps": 1100}
LOOPS = {
    "ddim": Loop(scheduler="DDIMScheduler", options=DDIM, total=172.0067, mean=0.223967),
    "ddim v": Loop(scheduler="DDIMScheduler", options={**DDIM, **V}, total=52.5302, mean=0.0684),
    "ddim to alpha one": Loop(
        scheduler="DDIMScheduler",
        options={**DDIM, "set_alpha_to_one": True, "beta_start": 0.01},
        total=149.8295,
        mean=0.1951,
    ),
    "ddim not to alpha one": Loop(
        scheduler="DDIMScheduler",
        options={**DDIM, "set_alpha_to_one": False, "beta_start": 0.01},
        total=149.0784,
        mean=0.1941,
    ),
    "ddim from noise": Loop(
        scheduler="DDIMScheduler", options=DDIM, last=2, total=354.5418, mean=0.4616
    ),
    "ddpm": Loop(scheduler="DDPMScheduler", options=DDPM, steps=None, total=258.9606, mean=0.3372),
    "ddpm v": Loop(
        scheduler="DDPMScheduler", options={**DDPM, **V}, steps=None, total=202.0296, mean=0.2631
    ),
    # published: 387.9466. diffusers' 1 - alpha_t / alpha_(t-1) keeps three digits in fp32 at t = 1;
    # its own loop in fp64 ends at 387.9676
    "ddpm from noise": Loop(
        scheduler="DDPMScheduler", options=DDPM, steps=None, last=2, total=387.9676, mean=0.5051
    ),
    "euler": Loop(scheduler=EULER, options=VE, scales=True, total=10.0807, mean=0.0131),
    "euler v": Loop(
        scheduler=EULER, options={**VE, **V}, scales=True, total=0.0002, mean=2.2676e-06
    ),
    "euler karras": Loop(
        scheduler=EULER,
        options={**VE, "use_karras_sigmas": True},
        scales=True,
        total=124.52299499511719,
        mean=0.16213932633399963,
    ),
    "ancestral": Loop(scheduler=ANCESTRAL, options=VE, scales=True, total=152.3192, mean=0.1983),
    "ancestral v": Loop(
        scheduler=ANCESTRAL, options={**VE, **V}, scales=True, total=108.4439, mean=0.1412
    ),
    "ancestral from noise": Loop(
        scheduler=ANCESTRAL, options=VE, scales=True, last=2, total=56163.0508, mean=73.1290
    ),
    "heun": Loop(scheduler=HEUN, options=VE, scales=True, total=0.1233, mean=0.0002),
    "heun v": Loop(
        scheduler=HEUN, options={**VE, **V}, scales=True, total=4.6934e-07, mean=6.1112e-10
    ),
    "heun karras": Loop(
        scheduler=HEUN,
        options={**VE, "use_karras_sigmas": True},
        scales=True,
        total=0.00015,
        mean=1.9869554535034695e-07,
    ),
    "heun from noise": Loop(
        scheduler=HEUN, options=VE, scales=True, last=2, total=75074.8906, mean=97.7538
    ),
    "dpm++": Loop(scheduler=MULTISTEP, options=DPM, total=None, mean=0.3301),
    "dpm++ v": Loop(scheduler=MULTISTEP, options={**DPM, **V}, total=None, mean=0.2251),
    "dpm++ karras v": Loop(
        scheduler=MULTISTEP,
        options={**DPM, **V, "use_karras_sigmas": True},
        total=None,
        mean=0.2096,
    ),
    "dpm++ lu v": Loop(
        scheduler=MULTISTEP, options={**DPM, **V, "use_lu_lambdas": True}, total=None, mean=0.1554
    ),
    "unipc": Loop(scheduler=UNIPC, options=BH2, total=None, mean=0.2464),
    "unipc v": Loop(scheduler=UNIPC, options={**BH2, **V}, total=None, mean=0.1014),
    "unipc karras v": Loop(
        scheduler=UNIPC,
        options={**BH2, **V, "use_karras_sigmas": True},
        total=None,
        mean=0.1966,
    ),
    "unipc from noise": Loop(scheduler=UNIPC, options=BH2, last=2, total=315.5757, mean=0.4109),
    "deis": Loop(scheduler=DEIS, options=SOLVER, total=None, mean=0.23916),
    "deis v": Loop(scheduler=DEIS, options={**SOLVER, **V}, total=None, mean=0.091),
    "deis from noise": Loop(scheduler=DEIS, options=SOLVER, last=2, total=315.3016, mean=0.41054),
    "dpm++ from noise": Loop(scheduler=MULTISTEP, options=DPM, last=5, total=318.4111, mean=0.4146),
}


def counted(direction: int = 1) -> Tensor:
    """(4, 3, 8, 8): the numbers from 0 to 767/768, or in the other direction."""
    numbers = torch.arange(768) if direction > 0 else torch.arange(768).flip(0)
    return (numbers / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def run(loop: Loop, scheduler: Any) -> Tensor:
    if loop.steps is not None:
        scheduler.set_timesteps(loop.steps)
    draw, x = torch.manual_seed(0), counted() * scheduler.init_noise_sigma
    draws = "generator" in inspect.signature(scheduler.step).parameters
    more = {"generator": draw} if draws else {}
    timesteps = scheduler.timesteps
    if loop.last is not None:
        steps = len(timesteps) if loop.steps is None else loop.steps
        timesteps = timesteps[(steps - loop.last) * scheduler.order :]
        x = scheduler.add_noise(x, counted(-1), timesteps[:1])
    for t in timesteps:
        x = scheduler.scale_model_input(x, t) if loop.scales else x
        x = scheduler.step(x * t / (t + 1), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("name", LOOPS)
def test_the_published_number(name: str) -> None:
    loop = LOOPS[name]
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    kind = getattr(import_diffusers(loop.scheduler), loop.scheduler)
    scheduler = kind(**{**betas, **loop.options})
    report = fuse(scheduler)
    size = run(loop, scheduler).abs()
    assert not report.scheduler_steps_left
    if loop.total is not None:
        assert abs(float(size.sum()) - loop.total) < 1e-2
    assert abs(float(size.mean()) - loop.mean) < 1e-3
