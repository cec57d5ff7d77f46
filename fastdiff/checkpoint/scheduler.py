"""Read and write diffusers' scheduler_config.json.

The file states three things: the noise schedule that the network was trained with
(`ScheduleConfig`), what the network predicts, and how to sample. The first two belong to the model,
so it is an error if fastdiff does not support them. The third is a preference: if fastdiff has no
table for it, `SchedulerConfig.sampler` is None, `no_sampler` explains why, and any other sampler
can be used.

Three things differ in spite of equal settings. Between timesteps, diffusers' Euler, Euler ancestral
and Heun interpolate sigma, ours its logarithm. diffusers' DDIM and PNDM step down by T // steps
with every spacing, ours to the next timestep; that is the same if steps divides T. When clamping,
diffusers' DDIM does not update the noise estimate; ours does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch

from fastdiff.diffusion.flow import shifted
from fastdiff.diffusion.samplers import Variance
from fastdiff.diffusion.schedules import (
    FlowSchedule,
    NoiseSchedule,
    ScheduleConfig,
    sigma_spacing,
    timestep_spacing,
)
from fastdiff.names import Prediction, ScheduleKind, SigmaSpacing, TimestepSpacing

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES: dict[str, ScheduleKind] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
VARIANCES: dict[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned",
}
_TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_LEADING: dict[str, Any] = {**_TRAINING, "timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE: dict[str, Any] = {**_LEADING, "timestep_spacing": "linspace"}
_CLIP: dict[str, Any] = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "rescale_betas_zero_snr": False,
}
_SIGMAS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_SOLVER: dict[str, Any] = {
    **_SIGMAS,
    "solver_order": 2,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_DPM: dict[str, Any] = {
    **_SOLVER,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
_DISTILLED: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "set_alpha_to_one": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**_LEADING, **_CLIP, "variance_type": "fixed_small"},
    "DDIMScheduler": {**_LEADING, **_CLIP, "set_alpha_to_one": True},
    "PNDMScheduler": {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "LMSDiscreteScheduler": {**_LINSPACE, **_SIGMAS},
    "EulerDiscreteScheduler": {
        **_LINSPACE,
        **_SIGMAS,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**_LINSPACE, "rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": {
        **_LINSPACE,
        **_SIGMAS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "clip_sample_range": 1.0,
    },
    "DPMSolverMultistepScheduler": {
        **_LINSPACE,
        **_DPM,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "rescale_betas_zero_snr": False,
    },
    "DPMSolverSinglestepScheduler": {**_TRAINING, **_DPM, "lower_order_final": False},
    "UniPCMultistepScheduler": {
        **_LINSPACE,
        **_SOLVER,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": (),
        "solver_p": None,
        "rescale_betas_zero_snr": False,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "DEISMultistepScheduler": {
        **_LINSPACE,
        **{k: v for k, v in _SOLVER.items() if k != "final_sigmas_type"},
        "algorithm_type": "deis",
        "solver_type": "logrho",
    },
    "KDPM2DiscreteScheduler": {**_LINSPACE, **_SIGMAS, "beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": {
        **_LINSPACE,
        **_SIGMAS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "LCMScheduler": {**_LEADING, **_CLIP, **_DISTILLED, "clip_sample": False},
    "TCDScheduler": {**_LEADING, **_CLIP, **_DISTILLED, "clip_sample": False},
    "UnCLIPScheduler": {
        **_TRAINING,
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "fixed_small_log",
        "clip_sample": True,
        "clip_sample_range": 1.0,
    },
}
"""Every option of a scheduler and its default, as of diffusers 0.42."""
FLOW_DEFAULTS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "invert_sigmas": False,
        "shift_terminal": None,
        **_SIGMAS,
        "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
}
"""The same for flow matching, without the options of dynamic shifting."""
_DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
FLOW_SCHEDULERS = {
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}
"""Our sampler -> diffusers' scheduler of flow matching."""
KNOWN_OPTIONS = frozenset().union(*DEFAULTS.values())
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
    "dpmpp-2m-sde": "DPMSolverMultistepScheduler",
    "dpmpp-3m": "DPMSolverMultistepScheduler",
    "dpm-singlestep": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-ancestral": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
"""Our sampler -> diffusers' equivalent scheduler."""
_OURS = {
    name: sampler
    for sampler, name in SCHEDULERS.items()
    if sampler not in ("dpmpp-2m-sde", "dpmpp-3m")
} | {"UnCLIPScheduler": "ddpm"}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "thresholding": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (*VARIANCES, None),
    "skip_prk_steps": (True,),
    "interpolation_type": ("linear",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (-math.inf,),
    "predict_x0": (True,),
    "disable_corrector": ((), []),
    "solver_p": (None,),
}
"""The values of each option that our tables support."""
_SOLVERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DPMSolverMultistepScheduler": {
        "solver_order": (2, 3),
        "solver_type": ("midpoint", "heun"),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    },
    "DPMSolverSinglestepScheduler": {
        "solver_order": (1, 2, 3),
        "solver_type": ("midpoint", "heun"),
        "algorithm_type": ("dpmsolver++",),
    },
    "UniPCMultistepScheduler": {"solver_order": (1, 2, 3), "solver_type": ("bh1", "bh2")},
    "DEISMultistepScheduler": {"solver_order": (1, 2, 3), "solver_type": ("logrho",)},
}
"""The same for options whose values depend on the scheduler."""
# their "linspace" is not rounded
REAL_TIMESTEPS = ("euler", "euler-ancestral", "heun", "lms", "kdpm2", "kdpm2-ancestral")
# "leading", "linspace": steps + 1 points minus one
ONE_POINT_MORE = ("dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "dpm-singlestep", "unipc", "deis")
WITH_EULER_AT_FINAL = ("dpmpp-2m", "dpmpp-2m-sde")
DISTILLED = ("lcm", "tcd")


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How one of diffusers' schedulers samples; `arguments` converts it for `build_table`."""

    sampler: str
    """A key of SCHEDULERS, and so of our SAMPLERS."""
    spacing: TimestepSpacing = "trailing"
    """How the timesteps are spaced, by that scheduler's definition."""
    steps_offset: int = 0
    """Added to the timesteps of spacing "leading"."""
    sigmas: SigmaSpacing | None = None
    """Spacing of noise levels between the first and last timestep; None: those of the timesteps."""
    final: Literal["zero", "sigma_min"] = "zero"
    """End at the clean image, or at the noise level of t = 0."""
    clamp: float | None = None
    """Limit of the estimate of x0; None: no limit."""
    variance: Variance | None = None
    """Only for ddpm."""
    lower_order_final: bool | None = None
    """Only for multistep solvers and dpm-singlestep: lower orders at the end, except for unipc and
    dpm-singlestep only if there are fewer than 15 steps."""
    euler_at_final: bool = False
    """Only for dpmpp-2m and dpmpp-2m-sde: a last step of order 1 for any number of steps."""
    solver_order: int | None = None
    """Only for dpm-singlestep, unipc and deis."""
    solver_type: str | None = None
    """Only for the dpmpp multistep solvers, dpm-singlestep and unipc."""
    original_steps: int | None = None
    """Only for lcm and tcd: the steps that the network was distilled with."""
    timestep_scaling: float | None = None
    """Only for lcm."""

    def arguments(self, schedule: NoiseSchedule, steps: int) -> dict[str, Any]:
        """Keyword arguments of `build_table` other than `name`, `schedule`, `steps`, `prediction`.

        If our spacing of the same name is different, `spacing` contains the timesteps themselves.
        """
        options: dict[str, Any] = {"final": self.final, "clamp": self.clamp}
        if self.variance is not None:
            options["variance"] = self.variance
        for name in ("solver_order", "solver_type", "timestep_scaling"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if self.lower_order_final is not None:
            few = steps < 15 or self.sampler in ("unipc", "dpm-singlestep")
            options["lower_order_final"] = self.euler_at_final or (self.lower_order_final and few)
        spacing, offset = self._spacing(schedule, steps)
        return {**options, "spacing": spacing, "steps_offset": offset}

    def _spacing(  # noqa: PLR0911
        self, schedule: NoiseSchedule, steps: int
    ) -> tuple[str | list[float], int]:
        total = schedule.num_timesteps
        if isinstance(schedule, FlowSchedule) and self.sampler in FLOW_SCHEDULERS:
            # the last of evenly spaced levels is 1 / T, shifted twice
            last = shifted(torch.tensor(1 / total, dtype=torch.float64), schedule.shift)
            s = torch.from_numpy(np.linspace(1.0, float(last), steps))
            return (shifted(s, schedule.shift) * total).tolist(), 0
        offset = self.steps_offset if self.spacing == "leading" else 0
        if self.original_steps is not None:
            return self._distilled_timesteps(total, steps), 0
        if self.sigmas is not None:
            # DPM-Solver++ spans the whole schedule, the others the range of their timesteps.
            if self.sampler in ONE_POINT_MORE or self.spacing == "linspace":
                return self.sigmas, 0
            ends = timestep_spacing(self.spacing, steps, total, offset=offset)
            low, high = (float(schedule.sigma(t) / schedule.alpha(t)) for t in (ends[-1], ends[0]))
            levels = torch.tensor(sigma_spacing(self.sigmas, steps, low, high)).double()
            return schedule.timestep(levels).tolist(), 0
        if self.sampler in REAL_TIMESTEPS and self.spacing == "linspace" and steps > 1:
            return np.linspace(total - 1, 0, steps).tolist(), 0
        if self.sampler in ONE_POINT_MORE and self.spacing == "linspace":
            return np.linspace(0, total - 1, steps + 1).round()[:0:-1].tolist(), 0
        if self.sampler in ONE_POINT_MORE and self.spacing == "leading":
            stride = total // (steps + 1)
            return [float(i * stride + offset) for i in range(steps, 0, -1)], 0
        return self.spacing, offset

    def _distilled_timesteps(self, total: int, steps: int) -> list[float]:
        """Every so many of the timesteps that the network was distilled with, from T - 1 down."""
        assert self.original_steps is not None
        if steps > self.original_steps:
            raise ValueError(
                f"this model was distilled with {self.original_steps} steps, got {steps}; use fewer"
            )
        stride = total // self.original_steps
        places = np.floor(np.linspace(0, self.original_steps, steps, endpoint=False))
        return [(self.original_steps - place) * stride - 1 for place in places.tolist()]


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The contents of a scheduler_config.json in fastdiff's terms."""

    schedule: ScheduleConfig
    prediction: Prediction
    sampler: SamplerSettings | None = None
    """None if fastdiff has no equivalent table; `no_sampler` explains why."""
    no_sampler: str = ""


def read_scheduler(data: Mapping[str, Any]) -> SchedulerConfig:
    """Read the contents of a scheduler_config.json.

    Options of diffusers' other schedulers are ignored, as in diffusers, because `from_config`
    carries them over. If fastdiff does not know the scheduler or an option, there is no sampler,
    but the noise schedule and the prediction are still read.

    Raises:
        ValueError: the noise schedule or the prediction is not supported, or an unknown scheduler
            does not state them.
    """
    name = data.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"scheduler: _class_name must be a class of diffusers, got {name!r:.60}")
    strange = [
        f"{key:.60}={value!r:.60}"
        for key, value in data.items()
        if not key.startswith("_") and key not in KNOWN_OPTIONS and value not in (None, False)
    ]
    if name in FLOW_DEFAULTS:
        return _flow_matching(name, data)
    defaults = DEFAULTS.get(name)
    if defaults is None:
        defaults = _noise_alone(name, data)
    options = {
        key: _checked(name, key, data.get(key, default), default)
        for key, default in defaults.items()
    }
    schedule, prediction = (
        _schedule(name, options),
        _one_of(name, options, PREDICTIONS, "prediction_type"),
    )
    reason = _no_sampler(name, options)
    if not reason and strange:
        reason = f"fastdiff has no sampler like {name} with {', '.join(strange)}"
    return SchedulerConfig(
        schedule=schedule,
        prediction=prediction,
        sampler=None if reason else _settings(name, options),
        no_sampler=reason,
    )


def _flow_matching(name: str, data: Mapping[str, Any]) -> SchedulerConfig:
    """Read a scheduler of flow matching: its class says what the network predicts."""
    defaults = FLOW_DEFAULTS[name]
    options = {k: _checked(name, k, data.get(k, v), v) for k, v in defaults.items()}
    changed = [k for k, v in options.items() if k not in ("num_train_timesteps", "shift") and v]
    changed += [
        k
        for k, v in data.items()
        if not k.startswith("_")
        and k not in (*options, *_DYNAMIC, *KNOWN_OPTIONS)
        and v not in (None, False)
    ]
    try:
        schedule = ScheduleConfig(
            kind="flow",
            num_timesteps=options["num_train_timesteps"],
            shift=1.0 if options.get("use_dynamic_shifting") else float(options["shift"]),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    sampler = next(ours for ours, theirs in FLOW_SCHEDULERS.items() if theirs == name)
    reason = f"fastdiff has no sampler like {name} with {', '.join(changed)}" if changed else ""
    return SchedulerConfig(
        schedule=schedule,
        prediction="flow",
        sampler=None if reason else SamplerSettings(sampler=sampler, spacing="linspace"),
        no_sampler=reason,
    )


def _noise_alone(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an unknown scheduler that concern the training's noise schedule.

    Raises:
        ValueError: the file relies on defaults of the class, which are unknown.
    """
    needed = [key for key in _TRAINING if key != "trained_betas"]
    if missing := [key for key in needed if data.get(key) is None]:
        raise ValueError(
            f"fastdiff does not know the scheduler {name:.60}, and its file does not state "
            f"{', '.join(missing)}; save the pipeline with one of {', '.join(DEFAULTS)}"
        )
    flow = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
    return {**_TRAINING, **flow, "timestep_type": "discrete", "rescale_betas_zero_snr": False}


def scheduler_config(
    schedule: ScheduleConfig, prediction: Prediction, sampler: SamplerSettings | None = None
) -> dict[str, Any]:
    """The scheduler_config.json of one of our models; without a sampler, DDIM from T - 1 down.

    Betas that diffusers has no name for are written as numbers ("trained_betas").

    Raises:
        ValueError: diffusers has no scheduler with this sampler or setting.
    """
    if prediction == "flow":
        return _flow_config(schedule, sampler or SamplerSettings(sampler="flow-euler"))
    sampler = sampler or SamplerSettings(sampler="ddim")
    if sampler.sampler not in SCHEDULERS or sampler.spacing == "simple":
        raise ValueError(
            f"diffusers has no scheduler for sampler {sampler.sampler!r} with spacing "
            f"{sampler.spacing!r}; use one of {', '.join(SCHEDULERS)}, spacing 'trailing'"
        )
    name = SCHEDULERS[sampler.sampler]
    data = {
        **_betas(name, schedule),
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": _key(PREDICTIONS, prediction),
        "timestep_spacing": sampler.spacing,
        "steps_offset": sampler.steps_offset,
        "set_alpha_to_one": sampler.final == "zero",
        "final_sigmas_type": sampler.final,
        "clip_sample": sampler.clamp is not None,
        "clip_sample_range": sampler.clamp or 1.0,
        "skip_prk_steps": True,
        "lower_order_final": sampler.lower_order_final is not False,
        "euler_at_final": sampler.euler_at_final,
        "solver_order": sampler.solver_order or (3 if sampler.sampler == "dpmpp-3m" else 2),
        "solver_type": sampler.solver_type or DEFAULTS[name].get("solver_type"),
        "original_inference_steps": sampler.original_steps or 50,
        "timestep_scaling": sampler.timestep_scaling or 10.0,
        "algorithm_type": DEFAULTS[name].get("algorithm_type"),
    }
    if name == "DPMSolverMultistepScheduler":
        sde = sampler.sampler == "dpmpp-2m-sde"
        data["algorithm_type"] = "sde-dpmsolver++" if sde else "dpmsolver++"
    if sampler.sampler == "ddpm":
        data["variance_type"] = _key(VARIANCES, sampler.variance or "fixed_small")
    if sampler.sigmas is not None:
        data[f"use_{sampler.sigmas}_sigmas"] = True
    data = {key: value for key, value in data.items() if key in DEFAULTS[name]}
    kept = _settings(name, {**DEFAULTS[name], **data})
    for field in fields(SamplerSettings):
        asked = getattr(sampler, field.name)
        if asked is not None and asked != getattr(kept, field.name):
            raise ValueError(
                f"{name} does not support {field.name} {asked!r}; set it to "
                f"{getattr(kept, field.name)!r}"
            )
    return {"_class_name": name, **data}


def _flow_config(schedule: ScheduleConfig, sampler: SamplerSettings) -> dict[str, Any]:
    """The scheduler_config.json of a model of flow matching, whose spacing is always the same."""
    plain = SamplerSettings(sampler=sampler.sampler, spacing=sampler.spacing)
    if sampler.sampler not in FLOW_SCHEDULERS or sampler != plain:
        raise ValueError(
            f"diffusers has no scheduler of flow matching for {sampler}; use one of "
            f"{', '.join(FLOW_SCHEDULERS)} without other settings"
        )
    return {
        "_class_name": FLOW_SCHEDULERS[sampler.sampler],
        "num_train_timesteps": schedule.num_timesteps,
        "shift": schedule.shift,
    }


def _checked(name: str, key: str, value: Any, default: Any) -> Any:
    """Check that a value has the type of its default; any type is valid if the default is None."""
    if default is None or isinstance(default, tuple):
        return value
    if key == "lambda_min_clipped" and value in ("-Infinity", None):  # JSON has no infinity
        return default
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"{name}: {key} must be {type(default).__name__}, got {value!r:.60}")
    return value


def _one_of(name: str, options: Mapping[str, Any], known: Mapping[str, Any], key: str) -> Any:
    if options[key] not in known:
        raise ValueError(
            f"{name}: {key} must be one of {', '.join(known)}, got {options[key]!r:.60}; "
            "fastdiff does not support this model"
        )
    return known[options[key]]


def _key(mapping: Mapping[str, str], value: str) -> str:
    return next(key for key, meaning in mapping.items() if meaning == value)


def _schedule(name: str, options: Mapping[str, Any]) -> ScheduleConfig:
    """The noise schedule of the training, which belongs to the model and cannot be replaced."""
    if options["trained_betas"] is not None:
        raise ValueError(
            f"{name}: trained_betas must be absent, got {options['trained_betas']!r:.40}; "
            "give the schedule by name (beta_schedule)"
        )
    for key in ("use_flow_sigmas", "use_dynamic_shifting"):
        if options.get(key):
            raise ValueError(
                f"{name}: {key} must be False, got True; fastdiff reads flow matching from "
                f"{' and '.join(FLOW_DEFAULTS)}"
            )
    if options.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"{name}: timestep_type must be 'discrete', got {options['timestep_type']!r:.60}; "
            "fastdiff passes timesteps to networks, not log sigma"
        )
    kind = _one_of(name, options, BETA_SCHEDULES, "beta_schedule")
    try:
        return ScheduleConfig(
            kind=kind,
            num_timesteps=options["num_train_timesteps"],
            beta_start=float(options["beta_start"]),
            beta_end=float(options["beta_end"]),
            zero_terminal_snr=options.get("rescale_betas_zero_snr", False),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _betas(name: str, schedule: ScheduleConfig) -> dict[str, Any]:
    """The options that give our betas to this scheduler."""
    plain = ScheduleConfig()
    cosine = (schedule.cosine_offset, schedule.max_beta)
    if (
        (schedule.kind == "sigmoid" and name != "DDPMScheduler")
        or (schedule.kind == "cosine" and cosine != (plain.cosine_offset, plain.max_beta))
        or (schedule.zero_terminal_snr and "rescale_betas_zero_snr" not in DEFAULTS[name])
    ):
        return {"trained_betas": NoiseSchedule(schedule).betas.tolist()}
    factor = 1000 / schedule.num_timesteps if schedule.rescale_ends else 1.0
    return {
        "beta_schedule": _key(BETA_SCHEDULES, schedule.kind),
        "beta_start": schedule.beta_start * factor,
        "beta_end": schedule.beta_end * factor,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }


def _no_sampler(name: str, options: Mapping[str, Any]) -> str:
    """Why fastdiff has no table equivalent to this scheduler; empty if it has one."""
    if name not in _OURS:
        return f"fastdiff has no sampler like {name}"
    for key, allowed in {**_ALLOWED, **_SOLVERS.get(name, {})}.items():
        value = options.get(key, allowed[0])
        if value not in allowed:
            return (
                f"fastdiff does not support {name} with {key}={value!r:.60}, "
                f"only with {', '.join(map(repr, allowed))}"
            )
    if options.get("use_karras_sigmas") and options.get("use_exponential_sigmas"):
        return f"{name} cannot use karras and exponential sigmas at the same time"
    if name == "DPMSolverMultistepScheduler" and options["solver_order"] == 3:
        if options["algorithm_type"] != "dpmsolver++":
            return f"the SDE of {name} with solver_order=3 is not the published one"
        if options["euler_at_final"] and options["final_sigmas_type"] != "zero":
            return f"fastdiff does not support {name} with solver_order=3 and euler_at_final=True"
    return ""


def _settings(name: str, options: Mapping[str, Any]) -> SamplerSettings:
    sampler = _OURS[name]
    if name == "DPMSolverMultistepScheduler":
        sde = options["algorithm_type"] == "sde-dpmsolver++"
        sampler = "dpmpp-3m" if options["solver_order"] == 3 else f"dpmpp-2m{'-sde' * sde}"
    to_zero = options.get("set_alpha_to_one", True) and (
        options.get("final_sigmas_type", "zero") == "zero"
    )
    if sampler in ("lcm", "deis", "tcd"):  # whatever the options
        to_zero = sampler == "lcm"
    sigmas = [kind for kind in get_args(SigmaSpacing) if options.get(f"use_{kind}_sigmas")]
    typed = sampler.startswith("dpm") or sampler == "unipc"
    return SamplerSettings(
        sampler=sampler,
        spacing=options.get("timestep_spacing", "linspace"),
        steps_offset=options.get("steps_offset", 0),
        sigmas=sigmas[0] if sigmas else None,
        final="zero" if to_zero else "sigma_min",
        clamp=float(options["clip_sample_range"]) if options.get("clip_sample") else None,
        variance=VARIANCES[options["variance_type"]] if sampler == "ddpm" else None,
        lower_order_final=options["lower_order_final"] if sampler in ONE_POINT_MORE else None,
        euler_at_final=options["euler_at_final"] if sampler in WITH_EULER_AT_FINAL else False,
        solver_order=options["solver_order"] if name in _SOLVERS and "pp" not in sampler else None,
        solver_type=options["solver_type"] if typed else None,
        original_steps=options["original_inference_steps"] if sampler in DISTILLED else None,
        timestep_scaling=float(options["timestep_scaling"]) if sampler == "lcm" else None,
    )
