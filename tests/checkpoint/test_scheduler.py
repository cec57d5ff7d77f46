"""A scheduler of diffusers read as ours takes the same steps; written back, diffusers loads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastdiff.checkpoint.scheduler import (
    DEFAULTS,
    SamplerSettings,
    read_scheduler,
    scheduler_config,
)
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from tests.diffusion.test_against_diffusers import SEEDS, SHAPE, Case, network, their_trajectory
from tests.support.peers import import_diffusers

# diffusers passes a torch tensor to np.array; torch's tensors do not know numpy 2's `copy` yet.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
UNKNOWN = {"num_train_timesteps": 1000, "prediction_type": "epsilon"}  # stated, as diffusers does
# scheduler_config.json of runwayml/stable-diffusion-v1-5 and of SDXL: each has options of others
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def peer(name: str, **options: Any) -> Any:
    return getattr(import_diffusers(name), name)(**options)


def written(scheduler: Any) -> dict[str, Any]:
    return json.loads(scheduler.to_json_string())


def test_every_option_and_default_is_diffusers() -> None:
    """Compared with the installed diffusers; older versions may lack some options."""
    for name, defaults in DEFAULTS.items():
        theirs = {k: v for k, v in peer(name).config.items() if not k.startswith("_")}
        ours = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
        assert theirs.keys() <= ours.keys(), name
        assert {key: ours[key] for key in theirs} == theirs, name


SAME_LEVELS = [
    (name, sigmas)
    for name in (
        "DDPMScheduler",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
    )
    for sigmas in (None, "karras", "exponential")
    if sigmas is None or f"use_{sigmas}_sigmas" in DEFAULTS[name]
]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize(("name", "sigmas"), SAME_LEVELS)
def test_the_same_timesteps_and_noise_levels(
    name: str, steps: int, sigmas: str | None, spacing: str
) -> None:
    options = {**STABLE_DIFFUSION, "timestep_spacing": spacing}
    if sigmas is not None:
        options[f"use_{sigmas}_sigmas"] = True
    theirs = peer(name, **options)
    read = read_scheduler(written(theirs))
    assert read.sampler is not None
    assert read.schedule.kind == "scaled_linear"
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule(read.schedule)
    torch.testing.assert_close(
        schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=0
    )
    table = build_table(
        read.sampler.sampler, schedule, steps, **read.sampler.arguments(schedule, steps)
    )
    expected = theirs.timesteps.double()
    rounded = name.startswith("DPM") and sigmas is not None  # it rounds or cuts, ours does not
    torch.testing.assert_close(table.timesteps, expected, rtol=0, atol=1.0 if rounded else 2e-3)
    if hasattr(theirs, "sigmas") and not rounded:
        # Euler interpolates sigma, ours its logarithm: 2e-5 apart in the middle of two timesteps
        torch.testing.assert_close(
            table.sigmas.float(), theirs.sigmas[: len(table)].float(), rtol=1e-4, atol=0
        )


LEADING = {"timestep_spacing": "leading"}
TRAJECTORIES: list[tuple[str, dict[str, Any]]] = [
    ("PNDMScheduler", {"skip_prk_steps": True}),  # Stable Diffusion 1.5
    ("EulerDiscreteScheduler", LEADING),  # SDXL
    ("EulerDiscreteScheduler", {**LEADING, "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    (
        "DDPMScheduler",
        {"clip_sample_range": 0.7, "variance_type": "fixed_large", "steps_offset": 0},
    ),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {**LEADING, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "lower_order_final": False}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {}),
    (
        "UniPCMultistepScheduler",
        {**LEADING, "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    ),
    ("DEISMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("LMSDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {**LEADING, "use_karras_sigmas": True}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", LEADING),
    ("LCMScheduler", {"clip_sample": True}),
    ("LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 2.0}),
    ("TCDScheduler", {}),
]


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize(("name", "options"), TRAJECTORIES, ids=str)
def test_the_same_way_from_noise_to_sample(
    name: str, options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the config alone, as far as fp32 tables and other interpolation allow."""
    known = {k: v for k, v in STABLE_DIFFUSION.items() if k in DEFAULTS[name]}
    theirs = peer(name, **{**known, **options})
    read = read_scheduler(written(theirs))
    assert read.sampler is not None
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule(read.schedule)
    sampler = read.sampler.sampler
    table = build_table(sampler, schedule, steps, **read.sampler.arguments(schedule, steps))
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = sample(lambda x, row: network(x, float(table.timesteps[row]), SHAPE[1]), table, x, SEEDS)
    case = Case(sampler=sampler, scheduler=name)
    expected = their_trajectory(case, theirs, x, monkeypatch)[-1]
    assert float((ours - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize(
    ("data", "sampler"),
    [
        (
            SD15,
            SamplerSettings(sampler="plms", spacing="leading", steps_offset=1, final="sigma_min"),
        ),
        (SDXL, SamplerSettings(sampler="euler", spacing="leading", steps_offset=1)),
    ],
)
def test_published_files(data: dict[str, Any], sampler: SamplerSettings) -> None:
    read = read_scheduler(data)
    assert read.sampler == sampler
    assert read.prediction == "eps"
    assert read.schedule == ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize(
    "sampler",
    [
        None,
        SamplerSettings(sampler="ddpm", spacing="leading", variance="learned", clamp=1.0),
        SamplerSettings(sampler="ddpm", spacing="trailing", variance="fixed_large"),
        SamplerSettings(sampler="ddim", spacing="leading", steps_offset=1, final="sigma_min"),
        SamplerSettings(sampler="plms", spacing="leading", steps_offset=1, final="sigma_min"),
        SamplerSettings(sampler="euler", spacing="linspace", sigmas="karras"),
        SamplerSettings(sampler="euler", spacing="trailing", final="sigma_min"),
        SamplerSettings(sampler="euler-ancestral", spacing="leading"),
        SamplerSettings(sampler="heun", spacing="linspace", sigmas="exponential", clamp=0.5),
        SamplerSettings(sampler="dpmpp-2m", spacing="linspace", lower_order_final=False),
        SamplerSettings(sampler="dpmpp-3m", spacing="linspace", solver_type="heun"),
        SamplerSettings(sampler="dpm-singlestep", spacing="linspace", solver_order=3),
        SamplerSettings(sampler="unipc", spacing="trailing", solver_order=3, solver_type="bh1"),
        SamplerSettings(sampler="deis", spacing="leading", final="sigma_min", solver_order=3),
        SamplerSettings(sampler="lms", spacing="linspace", sigmas="karras"),
        SamplerSettings(sampler="kdpm2", spacing="trailing"),
        SamplerSettings(sampler="kdpm2-ancestral", spacing="leading", steps_offset=1),
        SamplerSettings(sampler="lcm", spacing="leading", original_steps=40, timestep_scaling=2.0),
        SamplerSettings(sampler="tcd", spacing="leading", final="sigma_min", original_steps=25),
        SamplerSettings(
            sampler="dpmpp-2m-sde", spacing="trailing", euler_at_final=True, final="sigma_min"
        ),
    ],
    ids=lambda s: s.sampler if s else "default",
)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_what_is_written_is_loaded_by_diffusers_and_comes_back(
    sampler: SamplerSettings | None, prediction: Any
) -> None:
    schedule = ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
    data = json.loads(json.dumps(scheduler_config(schedule, prediction, sampler)))
    class_ = getattr(import_diffusers(data["_class_name"]), data["_class_name"])
    if data["_class_name"] == "PNDMScheduler" and prediction == "x0":
        return  # diffusers' has no such prediction when it steps
    theirs = class_.from_config(data)
    theirs.set_timesteps(10)
    torch.testing.assert_close(
        theirs.betas, NoiseSchedule(schedule).betas.float(), rtol=1e-5, atol=0
    )
    again = read_scheduler(written(theirs))
    assert again.schedule == schedule
    assert again.prediction == prediction
    wanted = sampler or SamplerSettings(sampler="ddim")
    assert again.sampler is not None
    for field, value in vars(wanted).items():
        assert value is None or getattr(again.sampler, field) == value, field


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(),
        ScheduleConfig(kind="cosine"),
        ScheduleConfig(kind="cosine", cosine_offset=0.01, max_beta=0.99),
        ScheduleConfig(kind="sigmoid"),
        ScheduleConfig(num_timesteps=4000, rescale_ends=True),
        ScheduleConfig(kind="scaled_linear", zero_terminal_snr=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler-ancestral"])
def test_any_schedule_of_ours_reaches_diffusers(schedule: ScheduleConfig, name: str) -> None:
    data = json.loads(json.dumps(scheduler_config(schedule, "v", SamplerSettings(sampler=name))))
    theirs = getattr(import_diffusers(data["_class_name"]), data["_class_name"]).from_config(data)
    torch.testing.assert_close(
        theirs.betas.double(), NoiseSchedule(schedule).betas, rtol=3e-4, atol=1e-6
    )
    if "trained_betas" in data:
        with pytest.raises(ValueError, match="trained_betas must be absent"):
            read_scheduler(data)
    else:
        expected, got = NoiseSchedule(schedule).betas, read_scheduler(data).schedule
        torch.testing.assert_close(NoiseSchedule(got).betas, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "FlowMatchLCMScheduler", "prediction_type": None},
            "does not state prediction_type; save the pipeline with one of DDPM",
        ),
        ({"_class_name": None}, "got None"),
        ({"prediction_type": "flow"}, "prediction_type must be one of epsilon"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be one of linear"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be absent"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps must be int, got '1000'"),
        ({"num_train_timesteps": True}, "num_train_timesteps must be int, got True"),
        ({"num_train_timesteps": 10**9}, "must be at most 1000000"),
        ({"beta_start": 2}, "0 < beta_start"),
        ({"beta_schedule": ["linear"]}, "beta_schedule must be str"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type must be 'discrete'",
        ),
    ],
)
def test_what_the_model_cannot_have_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_scheduler({**SD15, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("PNDMScheduler", {}, "skip_prk_steps=False"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding=True"),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, "solver_order=1"),
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
            "the SDE of DPMSolverMultistepScheduler with solver_order=3 is not the published one",
        ),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0=False"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type="),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type="),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
        ("EulerDiscreteScheduler", {"magic": 3}, "EulerDiscreteScheduler with magic=3"),
        ("EDMEulerScheduler", UNKNOWN, "no sampler like EDMEuler"),
        ("DPMSolverSDEScheduler", UNKNOWN, "no sampler like DPMSolverSDE"),
    ],
)
def test_a_sampler_that_we_lack_is_said_and_the_model_is_read(
    name: str, change: dict[str, Any], reason: str
) -> None:
    data = {**DEFAULTS.get(name, {}), **STABLE_DIFFUSION, **change, "_class_name": name}
    read = read_scheduler(json.loads(json.dumps(data)))
    assert read.sampler is None
    assert reason in read.no_sampler
    assert read.schedule.kind == "scaled_linear"


def test_a_setting_that_diffusers_lacks_is_refused() -> None:
    with pytest.raises(
        ValueError, match="HeunDiscreteScheduler does not support final 'sigma_min'"
    ):
        scheduler_config(
            ScheduleConfig(), "eps", SamplerSettings(sampler="heun", final="sigma_min")
        )
    with pytest.raises(ValueError, match="no scheduler for sampler 'ddim' with spacing 'simple'"):
        scheduler_config(ScheduleConfig(), "eps", SamplerSettings(sampler="ddim", spacing="simple"))
