"""diffusers' schedulers with each step as one kernel: `accelerate(pipeline, scheduler="fused")`.

The scheduler's class becomes a subclass of its own: its config, timesteps, `scale_model_input`,
`add_noise`, `init_noise_sigma`, `from_config` and `save_pretrained` are diffusers'. Only `step` is
ours: the noise levels that `set_timesteps` left in the scheduler become a table of
`fastdiff.diffusion.samplers`, and `sampler_step` runs its rows.

x stays in fp32 inside a step. Where a sampler draws noise it is Philox noise, its seeds drawn from
the generators, not what `torch.Generator` would give: other images of the same distribution. Euler,
Euler ancestral and Heun live in diffusers' variance-exploding space, x / alpha: their rows are
rescaled.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.checkpoint.scheduler import SchedulerConfig, read_scheduler
from fastdiff.diffusion.samplers import CLEAN, COLUMN, Level, SamplerTable, table_of_levels
from fastdiff.kernels import sampler_step
from fastdiff.kernels.sampler_step import HISTORY_SLOTS

EXPLODING = ("euler", "euler-ancestral", "heun")
TWO_ROWS = ("heun", "plms")  # their timesteps come twice
KEEPS_HISTORY = ("plms", "dpmpp-2m", "dpmpp-2m-sde")
UNUSED: dict[str, Any] = {
    "s_churn": 0.0,
    "s_tmin": 0.0,
    "s_tmax": float("inf"),
    "s_noise": 1.0,
    "use_clipped_model_output": False,
    "variance_noise": None,
}
"""Arguments of diffusers' `step` that our tables have no column for, at what means none."""


def read(scheduler: Any) -> SchedulerConfig:
    """The scheduler's config in our words."""
    name = type(scheduler).__name__
    return read_scheduler({**scheduler.config, "_class_name": name})


def objection(scheduler: Any) -> str | None:
    """Why a scheduler of diffusers cannot be served, or None."""
    if not type(scheduler).__module__.startswith("diffusers."):
        return f"{type(scheduler).__name__} is not a scheduler of diffusers"
    try:
        config = read(scheduler)
    except ValueError as error:
        return str(error)
    return config.no_sampler or _difference(config)


def _difference(config: SchedulerConfig) -> str | None:
    """Where our table of the same name does something else."""
    assert config.sampler is not None
    if config.sampler.sampler == "ddim" and config.sampler.clamp is not None:
        return "a clamp of diffusers' DDIM leaves the noise estimate as it was (clip_sample=True)"
    settings = config.sampler
    ends_at_0 = settings.spacing == "leading" and settings.steps_offset == 0
    if settings.variance == "fixed_large" and not ends_at_0:
        return "diffusers' DDPM adds noise in its last step where that is not t = 0, ours does not"
    if config.sampler.sampler == "plms" and config.prediction != "eps":
        return "diffusers' PNDM combines outputs that are not noise, ours combines noise"
    if config.schedule.zero_terminal_snr and config.sampler.sampler != "ddim":
        return "its zero-terminal-SNR levels end at a small number in place of 0"
    return None


class FusedScheduler:
    """What `fused_class` puts in front of a scheduler of diffusers."""

    served: type

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers', then the table of these timesteps."""
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        self.__dict__["_fused"] = Steps(self)

    def _fused_step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        generator: Any = None,
        eta: float = 0.0,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        for name, value in others.items():
            if value is not None and value != UNUSED.get(name, value):
                raise ValueError(
                    f"a fused {type(self).__name__} has no {name}, got {value!r:.60}; "
                    "leave it out, or use report.restore()"
                )
        steps = self.__dict__.get("_fused")
        if steps is None:
            raise ValueError("step came before set_timesteps; call it with the number of steps")
        x = steps.run(model_output, timestep, sample, generator, float(eta))
        if getattr(self, "_step_index", 0) is None:  # what scale_model_input looks up
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        if hasattr(self, "_step_index"):
            self._step_index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


@functools.cache
def fused_class(theirs: Any) -> Any:
    """A subclass of a scheduler of diffusers whose `step` is ours, with the same signature."""
    signature = inspect.signature(theirs.step)

    @functools.wraps(theirs.step)  # pipelines look for eta, generator
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        given.pop("self")
        given.update(given.pop("kwargs", {}))
        return self._fused_step(**given)

    # pipelines write a component's module and class into model_index.json: diffusers' own
    members = {"step": step, "served": theirs, "__reduce_ex__": _reduce}
    members["__module__"] = theirs.__module__
    return type(theirs.__name__, (FusedScheduler, theirs), members)


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    return _empty, (type(self).served,), dict(self.__dict__)


def _empty(theirs: type) -> Any:
    fused = fused_class(theirs)
    return fused.__new__(fused)


class Steps:
    """A table of one `set_timesteps`, where it is, and the history it has written."""

    def __init__(self, scheduler: Any) -> None:
        config = read(scheduler)
        assert config.sampler is not None, config.no_sampler
        self.sampler, self.prediction = config.sampler, config.prediction
        self.levels = levels_of(scheduler, self.sampler.sampler)
        self.timesteps = [float(t) for t in scheduler.timesteps]
        self.row: int | None = None
        self.eta: float | None = None
        self.start = 0
        self.device: torch.device | None = None
        self.history: Tensor | None = None
        self.seeds: Tensor | None = None

    def build(self, eta: float) -> SamplerTable:
        """The rows from the level of `start` on."""
        name, last = self.sampler.sampler, len(self.levels) - 1
        options: dict[str, Any] = {}
        if name == "ddim":
            options["eta"] = eta
        if name == "ddpm":
            options["variance"] = self.sampler.variance
        if name.startswith("dpmpp"):
            early = self.sampler.lower_order_final and last < 15
            options["lower_order_final"] = bool(early or self.sampler.euler_at_final)
        table = table_of_levels(
            name,
            self.levels[self.start :],
            prediction=self.prediction,
            clamp=self.sampler.clamp,
            **options,
        )
        return exploding(table) if name in EXPLODING else table

    def begin(self, timestep: float) -> int:
        """The row to begin with: image-to-image enters in the middle."""
        near = [abs(t - timestep) < 1e-3 * max(1.0, abs(t)) for t in self.timesteps]
        if not any(near):
            raise ValueError(
                f"timestep must be one of the scheduler's, got {timestep:g}; they go from "
                f"{self.timesteps[0]:g} to {self.timesteps[-1]:g}"
            )
        index = near.index(True)
        if self.sampler.sampler == "plms" and index:
            raise ValueError(
                f"a fused PNDMScheduler starts at its first timestep, got {timestep:g}; "
                "use DPMSolverMultistepScheduler for image-to-image"
            )
        if self.sampler.sampler in KEEPS_HISTORY:  # begins with a step of order 1 there
            self.start = index
            return 0
        return index

    def run(
        self, prediction: Tensor, timestep: Any, sample: Tensor, generator: Any, eta: float
    ) -> Tensor:
        """One row; sample: (N, C, ...) -> the next one, in the dtype of sample."""
        if self.row is None:
            self.row = self.begin(float(timestep))
        if eta != self.eta or self.device != sample.device:
            self.eta, self.device = eta, sample.device
            built = self.build(eta)
            self.table = built.to(sample.device)
            if self.seeds is None and bool(built.column("S").any()):
                self.seeds = seeds_of(generator, len(sample)).to(sample.device)
        seeds = self.seeds
        if seeds is None:  # nothing is drawn, so the generator stays where it is
            seeds = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)
        x = sample.to(torch.float32, copy=True)
        if self.history is None or self.history.shape[1:] != x.shape:
            self.history = x.new_zeros(HISTORY_SLOTS, *x.shape)
        rows = torch.full((len(x),), self.row, device=x.device)
        sampler_step(x, prediction, self.history, self.table, rows, seeds)
        self.row += 1
        return x.to(sample.dtype)


def seeds_of(generator: Any, count: int) -> Tensor:
    """(count,) int64, drawn from the generators, which move on as diffusers' noise moves them.

    So a second image of the same generator has other noise. None is PyTorch's own generator.
    """
    several = generator if isinstance(generator, list) else [generator]
    each = count if len(several) == 1 else 1
    drawn = [
        torch.randint(2**62, (each,), generator=g, device="cpu" if g is None else g.device)
        for g in several
    ]
    return torch.cat([seeds.cpu() for seeds in drawn])


def levels_of(scheduler: Any, sampler: str) -> list[Level]:
    """The noise levels a scheduler will go through, the one to end at last."""
    timesteps = [float(t) for t in scheduler.timesteps]
    if sampler in ("ddim", "ddpm", "plms"):
        return _levels_by_timestep(scheduler, sampler, list(dict.fromkeys(timesteps)))
    sigmas = [float(s) for s in scheduler.sigmas]
    if sampler == "heun":
        timesteps, sigmas = timesteps[:1] + timesteps[1::2], sigmas[:1] + sigmas[1::2]
    levels = []
    for t, sigma in zip([*timesteps, -1.0], sigmas, strict=True):
        alpha = (1 + sigma**2) ** -0.5
        levels.append(Level(t, alpha, sigma * alpha) if sigma else CLEAN)
    return levels


def _levels_by_timestep(scheduler: Any, sampler: str, timesteps: list[float]) -> list[Level]:
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    given = getattr(scheduler, "custom_timesteps", False)  # DDPM's own
    uneven = any(a - b != stride for a, b in pairwise(timesteps))
    if uneven and not given:
        raise ValueError(
            f"a fused {type(scheduler).__name__} steps from timestep to timestep, diffusers' by "
            f"{stride}: give a number of steps that divides "
            f"{scheduler.config.num_train_timesteps}, or timestep_spacing='leading'"
        )
    after = -1.0 if given else timesteps[-1] - stride
    alphas = scheduler.alphas_cumprod
    levels = [_level(t, float(alphas[int(t)])) for t in timesteps]
    if after >= 0:
        last = float(alphas[int(after)])
    else:
        last = 1.0 if sampler == "ddpm" else float(scheduler.final_alpha_cumprod)
    return [*levels, _level(after, last) if last < 1 else CLEAN]


def _level(t: float, alpha_cumprod: float) -> Level:
    return Level(t, alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5)


def exploding(table: SamplerTable) -> SamplerTable:
    """The table for x / alpha in place of x: the history stays what it was."""
    now = (1 + table.sigmas.square()).rsqrt()
    final = torch.tensor([table.final_sigma], dtype=now.dtype)
    after = (1 + torch.cat([table.sigmas[1:], final]).square()).rsqrt()
    columns = table.columns.clone()
    for name in ("U", "A", "P"):
        columns[:, COLUMN[name]] *= now
    for name in ("A", "B", "C1", "C2", "C3", "S"):
        columns[:, COLUMN[name]] /= after
    return replace(table, columns=columns)
