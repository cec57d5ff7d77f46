"""Every sampler's trajectory equals diffusers' scheduler on the same network and the same noise.

diffusers keeps its coefficients in fp32, so 1e-5 relative is what can be asked; our side runs in
fp64. Its schedulers get our alphas_cumprod in fp64 where they read it (1 - alphas_cumprod loses
half its digits in fp32 at the last timesteps); test_schedules.py compares the betas.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch

from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.kernels import SAMPLER_NOISE, philox_normal
from tests.support.peers import import_diffusers

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SHAPE = (3, 2, 4, 5)

# diffusers passes a torch tensor to np.array; torch's tensors do not know numpy 2's `copy` yet.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    ),
    # DEIS and KDPM2 call numpy with tensors; DPM-Solver of 2022a is on its way out.
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types=dpmsolver. is deprecated:FutureWarning"),
]
SEEDS = torch.tensor([3, 1, 2**40 + 5])


@dataclass(frozen=True, kw_only=True)
class Case:
    sampler: str
    scheduler: str
    steps: int = 20
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    zero_terminal_snr: bool = False
    explicit_timesteps: bool = False
    rounds_t: bool = False
    learned: bool = False
    exact: bool = False
    """Their sigmas are replaced by ours, which are fp64; what is left of 1e-5 is rounding then."""
    predictions: tuple[str, ...] = ("eps", "v")

    def __str__(self) -> str:
        settings = {**self.ours, **self.theirs}
        words = [f"{k}={v}" for k, v in settings.items() if isinstance(v, str | float | int)]
        return " ".join([self.sampler, str(self.steps), *words])


def leading(offset: int = 1) -> dict[str, Any]:
    return {
        "ours": {"spacing": "leading", "steps_offset": offset, "final": "sigma_min"},
        "theirs": {
            "timestep_spacing": "leading",
            "steps_offset": offset,
            "set_alpha_to_one": False,
        },
    }


TRAILING = {"ours": {"spacing": "trailing"}, "theirs": {"timestep_spacing": "trailing"}}


def merged(base: dict[str, Any], *, ours: Any = None, theirs: Any = None) -> dict[str, Any]:
    return {
        "ours": {**base["ours"], **(ours or {})},
        "theirs": {**base["theirs"], **(theirs or {})},
    }


SDE = {"algorithm_type": "sde-dpmsolver++"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SINGLESTEP, MULTISTEP = "DPMSolverSinglestepScheduler", "DPMSolverMultistepScheduler"
SIGMAS = [
    ("lms", "LMSDiscreteScheduler"),
    ("kdpm2", "KDPM2DiscreteScheduler"),
    ("kdpm2-ancestral", "KDPM2AncestralDiscreteScheduler"),
    ("dpmpp-sde", "DPMSolverSDEScheduler"),
]
NEWER_CASES = [
    *(
        Case(sampler=sampler, scheduler=scheduler, steps=steps, ours=ours, theirs=theirs)
        for sampler, scheduler in SIGMAS
        for steps, ours, theirs in (
            (20, TRAILING["ours"], TRAILING["theirs"]),
            (
                25,
                {"spacing": "leading", "steps_offset": 1},
                {"timestep_spacing": "leading", "steps_offset": 1},
            ),
            (12, {"spacing": "exponential"}, {"use_exponential_sigmas": True}),
            (2, TRAILING["ours"], TRAILING["theirs"]),
        )
    ),
    *(
        Case(
            sampler="deis",
            scheduler="DEISMultistepScheduler",
            exact=True,
            steps=steps,
            **merged(
                TRAILING,
                ours={
                    "solver_order": order,
                    "lower_order_final": steps < 15,
                    "final": "sigma_min",
                },
                theirs={"solver_order": order},
            ),
        )
        for order, steps in ((1, 10), (2, 20), (3, 20), (3, 10), (3, 1))
    ),
    *(
        Case(
            sampler="unipc",
            scheduler="UniPCMultistepScheduler",
            exact=True,
            steps=steps,
            **merged(
                TRAILING,
                ours={"solver_order": order, "solver_type": kind, **ours},
                theirs={"solver_order": order, "solver_type": kind, **theirs},
            ),
        )
        for order, kind, steps, ours, theirs in (
            (1, "bh2", 10, {}, {}),
            (2, "bh2", 20, {}, {}),
            (2, "bh1", 5, {"final": "sigma_min"}, SIGMA_MIN),  # theirs is NaN at sigma = 0
            (3, "bh2", 20, {}, {}),
            (3, "bh1", 4, {"final": "sigma_min"}, SIGMA_MIN),
            (2, "bh2", 1, {}, {}),
            (
                3,
                "bh2",
                12,
                {"final": "sigma_min", "lower_order_final": False},
                {**SIGMA_MIN, "lower_order_final": False},
            ),
        )
    ),
    *(
        Case(
            sampler="dpm-singlestep",
            scheduler=SINGLESTEP,
            exact=True,
            steps=steps,
            explicit_timesteps=True,
            ours={"solver_order": order, "solver_type": kind, **ours},
            theirs={"solver_order": order, "solver_type": kind, **theirs},
        )
        for order, kind, steps, ours, theirs in (
            (1, "midpoint", 5, {}, {}),
            (2, "midpoint", 20, {}, {}),
            (2, "heun", 7, {}, {}),
            (3, "midpoint", 20, {}, {}),
            (3, "heun", 21, {}, {}),
            (3, "heun", 10, {}, {}),
            (
                3,
                "heun",
                12,
                {"final": "sigma_min", "lower_order_final": False},
                SIGMA_MIN,
            ),
            (
                3,
                "midpoint",
                11,
                {"final": "sigma_min", "estimate": "eps"},
                {**SIGMA_MIN, "algorithm_type": "dpmsolver", "lower_order_final": True},
            ),
            (
                2,
                "heun",
                8,
                {"final": "sigma_min", "estimate": "eps", "lower_order_final": False},
                {**SIGMA_MIN, "algorithm_type": "dpmsolver"},
            ),
            (
                3,
                "heun",
                9,
                {"final": "sigma_min", "estimate": "eps", "lower_order_final": False},
                {**SIGMA_MIN, "algorithm_type": "dpmsolver"},
            ),
        )
    ),
    *(
        Case(
            sampler=f"dpmpp-{order}m{noisy}",
            scheduler=MULTISTEP,
            steps=steps,
            **merged(
                TRAILING,
                ours={"solver_type": kind, "lower_order_final": steps < 15},
                theirs={"solver_order": order, "solver_type": kind, **(SDE if noisy else {})},
            ),
        )
        for order, kind, steps, noisy in (
            (2, "heun", 20, ""),
            (2, "heun", 10, "-sde"),
            (3, "midpoint", 20, ""),
            (3, "midpoint", 8, ""),
            (3, "heun", 4, ""),
            (3, "heun", 2, ""),
        )
    ),
    *(
        Case(
            sampler="lcm",
            scheduler="LCMScheduler",
            steps=steps,
            explicit_timesteps=True,
            ours=ours,
            theirs=theirs,
            predictions=("eps", "v", "x0"),
        )
        for steps, ours, theirs in (
            (4, {}, {}),
            (8, {"timestep_scaling": 1.0}, {"timestep_scaling": 1.0}),
            (1, {"clamp": 0.7}, {"clip_sample": True, "clip_sample_range": 0.7}),
        )
    ),
    *(
        Case(
            sampler="tcd",
            scheduler="TCDScheduler",
            steps=steps,
            explicit_timesteps=True,
            ours={"final": "sigma_min", "eta": eta},
            step={"eta": eta},
            predictions=("eps", "v", "x0"),
        )
        for steps, eta in ((4, 0.3), (8, 0.0), (3, 1.0))
    ),
]
CASES = [
    # DDPM. diffusers adds noise in the last step too, unless that is t = 0 ("trailing" is not):
    # its fixed_small is 1e-10 then and does not show, its fixed_large and learned differ from
    # algorithm 2, so they run "leading".
    Case(
        sampler="ddpm", scheduler="DDPMScheduler", **merged(TRAILING, theirs={"clip_sample": False})
    ),
    *(
        Case(
            sampler="ddpm",
            scheduler="DDPMScheduler",
            ours={"spacing": "leading", "variance": ours},
            theirs={"timestep_spacing": "leading", "variance_type": theirs, "clip_sample": False},
            learned=ours == "learned",
        )
        for ours, theirs in (("fixed_large", "fixed_large"), ("learned", "learned_range"))
    ),
    # A clamp means the same in DDPM; in DDIM only with use_clipped_model_output.
    Case(
        sampler="ddpm",
        scheduler="DDPMScheduler",
        **merged(TRAILING, ours={"clamp": 0.8}, theirs={"clip_sample_range": 0.8}),
    ),
    Case(
        sampler="ddim",
        scheduler="DDIMScheduler",
        **merged(TRAILING, ours={"clamp": 0.8}, theirs={"clip_sample_range": 0.8}),
        step={"use_clipped_model_output": True},
    ),
    *(
        Case(
            sampler="ddim",
            scheduler="DDIMScheduler",
            **merged(spacing, ours={"eta": eta}, theirs={"clip_sample": False}),
            step={"eta": eta},
            predictions=("eps", "v", "x0"),
        )
        for eta in (0.0, 0.4, 1.0)
        for spacing in (TRAILING, leading())
    ),
    # Zero terminal SNR: DDIM keeps alpha = 0. (diffusers' Euler and DPM-Solver++ put 2^-24
    # there: not compared.)
    Case(
        sampler="ddim",
        scheduler="DDIMScheduler",
        **merged(TRAILING, theirs={"clip_sample": False, "rescale_betas_zero_snr": True}),
        zero_terminal_snr=True,
        predictions=("v", "x0"),
    ),
    # Euler and Heun end at sigma = 0 whatever the spacing, and space "linspace" without rounding
    # (27 divides 999).
    *(
        Case(sampler=sampler, scheduler=scheduler, steps=steps, ours=ours, theirs=theirs)
        for sampler, scheduler in (
            ("euler", "EulerDiscreteScheduler"),
            ("euler-ancestral", "EulerAncestralDiscreteScheduler"),
            ("heun", "HeunDiscreteScheduler"),
        )
        for steps, ours, theirs in (
            (20, TRAILING["ours"], TRAILING["theirs"]),
            (28, {"spacing": "linspace"}, {"timestep_spacing": "linspace"}),
            (
                25,
                {"spacing": "leading", "steps_offset": 1},
                {"timestep_spacing": "leading", "steps_offset": 1},
            ),
            (1, TRAILING["ours"], TRAILING["theirs"]),
        )
    ),
    *(
        Case(
            sampler=sampler,
            scheduler=scheduler,
            ours={"spacing": spacing},
            theirs={f"use_{spacing}_sigmas": True},
        )
        for sampler, scheduler in (
            ("euler", "EulerDiscreteScheduler"),
            ("heun", "HeunDiscreteScheduler"),
        )
        for spacing in ("karras", "exponential")
    ),
    # PNDM: both ends of its spacing, and each of its starting formulas as the last one. With v
    # prediction diffusers combines the v's of different timesteps and turns the sum into eps;
    # PNDM combines eps, and so do we.
    *(
        Case(
            sampler="plms",
            scheduler="PNDMScheduler",
            steps=steps,
            **merged(leading(), theirs={"skip_prk_steps": True}),
            predictions=("eps",),
        )
        for steps in (2, 3, 4, 5, 20)
    ),
    Case(
        sampler="plms",
        scheduler="PNDMScheduler",
        **merged(TRAILING, theirs={"skip_prk_steps": True, "set_alpha_to_one": True}),
        predictions=("eps",),
    ),
    # DPM-Solver++. diffusers' "leading" and "linspace" leave out one point more than its other
    # schedulers, so these timesteps are given to ours. It gives the network rounded timesteps
    # with Karras sigmas.
    *(
        case
        for sampler, kind in (("dpmpp-2m", {}), ("dpmpp-2m-sde", SDE))
        for case in (
            Case(
                sampler=sampler,
                scheduler="DPMSolverMultistepScheduler",
                **merged(TRAILING, theirs=kind),
            ),
            Case(
                sampler=sampler,
                scheduler="DPMSolverMultistepScheduler",
                explicit_timesteps=True,
                theirs={"timestep_spacing": "linspace", **kind},
            ),
            Case(
                sampler=sampler,
                scheduler="DPMSolverMultistepScheduler",
                explicit_timesteps=True,
                ours={"final": "sigma_min", "lower_order_final": False},
                theirs={
                    "timestep_spacing": "leading",
                    "lower_order_final": False,
                    **SIGMA_MIN,
                    **kind,
                },
            ),
            # lower_order_final takes effect below 15 steps only in diffusers; ours says what it
            # does
            Case(
                sampler=sampler,
                scheduler="DPMSolverMultistepScheduler",
                steps=10,
                **merged(TRAILING, ours={"final": "sigma_min"}, theirs={**SIGMA_MIN, **kind}),
            ),
            Case(
                sampler=sampler,
                scheduler="DPMSolverMultistepScheduler",
                steps=1,
                **merged(TRAILING, theirs=kind),
            ),
            Case(
                sampler=sampler,
                scheduler="DPMSolverMultistepScheduler",
                ours={"spacing": "karras"},
                theirs={"use_karras_sigmas": True, **kind},
                rounds_t=True,
            ),
        )
    ),
]


def network(x: torch.Tensor, t: float, channels: int) -> torch.Tensor:
    """A smooth function of x and t in place of a network, with a different answer in each
    channel.
    """
    phase = torch.arange(channels, dtype=x.dtype).reshape(-1, 1, 1)
    x = x.repeat(1, channels // x.shape[1], 1, 1)
    return 0.8 * torch.tanh(x + phase / 3) * torch.cos(phase + t / 400) + 0.2 * torch.sin(2 * x)


EXPLODING = ("LMS", "KDPM2", "DPMSolverSDE")


class Brownian:
    """A Brownian motion in sigma, from one Philox draw per row, in place of torchsde's tree."""

    def __init__(self) -> None:
        self.row, self.first = 0, torch.zeros(())
        self.middle = 0.0

    def __call__(self, sigma: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """The increment from sigma to `to`, divided by the root of its variance."""
        drawn = philox_normal(SEEDS, SHAPE[1:], step=self.row, stream=SAMPLER_NOISE).double()
        if self.row % 2 == 0:
            self.first, self.middle = drawn, float(to)
            return drawn
        w = (float(sigma) - self.middle) / (float(sigma) - float(to))
        return w**0.5 * self.first + (1 - w) ** 0.5 * drawn


def their_trajectory(
    case: Case, scheduler: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    channels = 2 * x.shape[1] if case.learned else x.shape[1]
    sigmas = getattr(scheduler, "sigmas", None)
    exploding = type(scheduler).__name__.startswith(("Euler", "Heun", *EXPLODING))
    middle = getattr(scheduler, "sigmas_interpol", None)
    shift = 1 if "Ancestral" in type(scheduler).__name__ else 0

    def growth(row: int) -> torch.Tensor | float:
        """Their x over ours: 1 / alpha in the schedulers that live in the variance-exploding
        space.
        """
        if not exploding:
            return 1.0
        sigma = sigmas[row].double()
        if middle is not None and row % 2:
            sigma = middle[row - shift].double()
        elif "SDE" in case.scheduler and row % 2 and row + 1 < len(sigmas):
            sigma = (sigmas[row - 1].double() * sigmas[row].double()).sqrt()
        return (sigma.square() + 1).sqrt()

    x = x * growth(0)
    trajectory = []
    brownian = Brownian()
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = brownian
    for row, t in enumerate(scheduler.timesteps):
        brownian.row = row
        if hasattr(module, "randn_tensor"):
            noise = philox_normal(SEEDS, SHAPE[1:], step=row, stream=SAMPLER_NOISE).double()
            monkeypatch.setattr(module, "randn_tensor", lambda *_, _noise=noise, **__: _noise)
        output = network(scheduler.scale_model_input(x, t), float(t), channels)
        x = scheduler.step(output, t, x, **case.step).prev_sample.double()
        trajectory.append(x / growth(row + 1))
    return trajectory


def scheduler_class(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of diffusers. That of DPM++ SDE wants torchsde, of whose noise nothing is used."""
    if name != "DPMSolverSDEScheduler":
        return getattr(import_diffusers(name), name)
    import_diffusers("DDIMScheduler")
    if importlib.util.find_spec("torchsde") is None:
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    return getattr(importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde"), name)


@pytest.mark.parametrize(
    ("case", "prediction"),
    [(c, p) for c in (*CASES, *NEWER_CASES) for p in c.predictions],
    ids=str,
)
def test_trajectory(case: Case, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule(
        ScheduleConfig(
            kind="scaled_linear", zero_terminal_snr=case.zero_terminal_snr, **STABLE_DIFFUSION
        )
    )
    scheduler = scheduler_class(case.scheduler, monkeypatch)(
        beta_schedule="scaled_linear",
        prediction_type=PREDICTIONS[prediction],
        **STABLE_DIFFUSION,
        **case.theirs,
    )
    if case.scheduler.startswith(("DDPM", "DDIM", "PNDM", "LCM", "TCD")):
        scheduler.alphas_cumprod = schedule.alphas_cumprod
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
        if not case.theirs.get("set_alpha_to_one", True):
            scheduler.final_alpha_cumprod = schedule.alphas_cumprod[0]
    scheduler.set_timesteps(case.steps)

    ours = dict(case.ours)
    if case.explicit_timesteps:
        ours["spacing"] = scheduler.timesteps.tolist()
    table = build_table(case.sampler, schedule, case.steps, prediction=prediction, **ours)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    channels = 2 * SHAPE[1] if case.learned else SHAPE[1]
    if case.exact:
        scheduler.sigmas = torch.cat([table.sigmas, table.sigmas.new_tensor([table.final_sigma])])

    def predict(x: torch.Tensor, row: int) -> torch.Tensor:
        t = float(table.timesteps[row])
        return network(x, round(t) if case.rounds_t else t, channels)

    trajectory: list[torch.Tensor] = []
    sample(
        predict,
        table,
        x,
        SEEDS,
        on_step=lambda step: trajectory.append(step.x.clone()),
    )

    theirs = their_trajectory(case, scheduler, x, monkeypatch)
    assert len(trajectory) == len(theirs)
    for row, (a, b) in enumerate(zip(trajectory, theirs, strict=True)):
        error = float((a - b).norm() / b.norm())
        assert error < (1e-10 if case.exact else 1e-5), (
            f"row {row} of {len(table)}: relative error {error:.2e}"
        )
