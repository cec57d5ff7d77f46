"""A guided sampler step: x in and out, both halves of the prediction in, one slot in and out."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff import kernels
from fastdiff.bench.clock import Timer
from fastdiff.bench.providers import EVERYTHING, LATER, OURS, Arguments, Make, Subject
from fastdiff.bench.run import Case, Outcome, record_of, said
from fastdiff.bench.shapes import GPU_BATCHES, Call, Job
from fastdiff.kernels import COLUMNS as C

COEFFICIENTS = {C.U: 1.0, C.V: -0.5, C.A: 0.5, C.B: 0.4, C.C1: 0.1, C.P: 0.1, C.Q: 1.0, C.W: 3.0}
ROWS = {"deterministic": 0.0, "stochastic": 0.1}
"""Row -> the factor of the noise."""


def eager(x: Tensor, prediction: Tensor, history: Tensor, noise_factor: float) -> None:
    """The step as a scheduler would write it, with PyTorch's own noise."""
    c = COEFFICIENTS
    uncond, cond = prediction.chunk(2)
    guided = uncond + c[C.W] * (cond - uncond)
    denoised = c[C.U] * x + c[C.V] * guided
    new = c[C.A] * x + c[C.B] * denoised + c[C.C1] * history[0]
    if noise_factor:
        new = new + noise_factor * torch.randn_like(x)
    history[0] = c[C.P] * x + c[C.Q] * denoised
    x.copy_(new)


def row_of(row: str, device: torch.device) -> Tensor:
    """A table with one row."""
    table = torch.zeros(1, len(C))
    extra = {C.SLOT: 0.0, C.CLAMP: math.inf, C.S: ROWS[row]}
    for column, value in {**COEFFICIENTS, **extra}.items():
        table[0, column] = value
    return table.to(device)


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    x, prediction = call.tensors
    (row, _), *_ = call.options
    fp32 = Make(torch.float32, make.device)
    seeds, history = torch.arange(x[0], device=make.device), torch.zeros(3, *x, device=make.device)
    rows, options = torch.zeros_like(seeds), halves(seeds)
    return (fp32(*x), make(*prediction), history, row_of(row, make.device), rows, seeds), options


def halves(number: Tensor) -> dict[str, Any]:
    """The options for a prediction [uncond; cond] without rescaling, as in the engine."""
    return {"cond": number + len(number), "uncond": number, "rescale": False}


def eager_deterministic(x: Tensor, f: Tensor, history: Tensor, *_: Tensor, **__: Any) -> None:
    eager(x, f, history, ROWS["deterministic"])


def eager_stochastic(x: Tensor, f: Tensor, history: Tensor, *_: Tensor, **__: Any) -> None:
    eager(x, f, history, ROWS["stochastic"])


def gpu_cases(size: int = 64, batches: tuple[int, ...] = GPU_BATCHES) -> list[Case]:
    """Stable Diffusion's latents; no network calls this op."""
    cases = []
    for row, function in (("deterministic", eager_deterministic), ("stochastic", eager_stochastic)):
        subject = Subject(op="sampler_step", arguments=arguments, eager=function)
        for batch in batches:
            shapes = (batch, 4, size, size), (2 * batch, 4, size, size)
            call = Call("sampler_step", shapes, ((row, ()),))
            job = Job(network="unet", preset="sd1", size=size, batch=batch)
            providers = EVERYTHING if batch == batches[0] else LATER
            case = Case(subject=subject, job_name="", job=job, call=call, providers=providers)
            cases.append(case)
    return cases


# Against other people's schedulers

SCHEDULERS = {
    "diffusers DDIM": "DDIMScheduler",
    "diffusers Euler": "EulerDiscreteScheduler",
    "diffusers DPM++ 2M": "DPMSolverMultistepScheduler",
}
STEPS = 50
FROM_THE_HOST = "sampler_step, from the host"


def stepping(name: str, diffusers: Any, x: Tensor, prediction: Tensor) -> Callable[[], None]:
    """Guidance and ``scheduler.step`` as in a pipeline; each call takes the next step."""
    scheduler = getattr(diffusers, SCHEDULERS[name])(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    scheduler.set_timesteps(STEPS, device=x.device)
    scheduler.is_scale_input_called = True  # otherwise Euler warns at every step
    taken = itertools.count()

    def step() -> None:
        index = 1 + next(taken) % (STEPS - 2)
        if getattr(scheduler, "_step_index", None) is not None:
            scheduler._step_index = index  # start over after the last step but one
        uncond, cond = prediction.chunk(2)
        guided = uncond + COEFFICIENTS[C.W] * (cond - uncond)
        scheduler.step(guided, scheduler.timesteps[index], x, return_dict=False)

    return step


def from_the_host(
    timer: Timer,
    device: torch.device,
    diffusers: Any,
    *,
    size: int = 64,
    batches: tuple[int, ...] = GPU_BATCHES,
) -> Outcome:
    """Time our step and diffusers' as a sampling loop experiences them, with launches and waiting.

    Args:
        diffusers: the package, or None if it is not installed; then only ours is timed.
    """
    outcome = Outcome()
    for case in gpu_cases(size, batches):
        if dict(case.call.options).keys() != {"deterministic"}:
            continue
        args, options = arguments(case.call, case.job, Make(case.dtype, device))
        x, prediction = args[0], args[1]
        absent = kernels.available()["sampler_step"]
        ours = [name for name in (*OURS, "reference") if absent[name] is None]
        steps: dict[str, Callable[[], Any]] = {
            name: functools.partial(kernels.sampler_step, *args, **options) for name in ours
        }
        for name in SCHEDULERS if diffusers is not None else ():
            steps[name] = stepping(name, diffusers, x.to(prediction.dtype), prediction)
        for name, function in steps.items():
            backend = name if name in ours else "reference"
            try:
                with torch.inference_mode(), kernels.backend(backend):
                    timing = timer(function, method="host")
            except kernels.BackendError as error:  # the CUDA kernels are not built for this device
                outcome.unavailable.append(f"{case} {name}: {said(error)}")
                continue
            except Exception as error:  # noqa: BLE001 - reported; the other cases continue
                outcome.failures.append(f"{case} {name}: {said(error)}")
                continue
            record = record_of(case, name, timing, case.work)
            outcome.records.append(replace(record, benchmark=FROM_THE_HOST))
    return outcome
