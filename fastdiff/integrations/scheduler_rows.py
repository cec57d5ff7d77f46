"""One step of each of diffusers' schedulers as a row of `sampler_step`, read from the scheduler.

    D  = clamp(u x + v F, -clamp, clamp)
    x' = a x + b D + sum of factor * tensor over `older` + s noise

The state that a step depends on (timesteps, sigmas, `step_index`, `begin_index`, earlier outputs)
stays in diffusers' own attributes and is read during the call. So a step may be repeated, taken out
of order, taken from a copy or by diffusers' own code, and the next step is still correct.

A reader returns the row, or the reason why diffusers' own step has to run. It changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastdiff.diffusion.levels import CLEAN, Level
from fastdiff.diffusion.predictions import Prediction, to_denoised
from fastdiff.diffusion.samplers import Row
from fastdiff.diffusion.samplers.multistep import ADAMS_BASHFORTH, dpmpp_2m_sde, dpmpp_3m_sde
from fastdiff.diffusion.samplers.onestep import ddim, ddpm

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "original_sample": "x0",
}
LEAST_VARIANCE = 1e-20
"""Lower limit of variances in diffusers' DDPM, applied before taking logarithms."""
DEGENERATE = "a noise level is 0 or occurs twice, so the formula would divide by zero"


class Host:
    """A scheduler's tensors as Python numbers, each read only once: reading may wait for a GPU."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Tensor, int, list[Any]]] = {}

    def numbers(self, scheduler: Any, name: str) -> list[Any]:
        """The values of attribute `name`, read again if it was replaced or modified in place."""
        tensor = getattr(scheduler, name)
        if not isinstance(tensor, Tensor) or tensor.is_inference():  # no version counter
            return [float(t) for t in tensor]
        known = self._read.get(name)
        if known is None or known[0] is not tensor or known[1] != tensor._version:
            known = self._read[name] = (tensor, tensor._version, tensor.tolist())
        return known[2]

    def timestep(self, scheduler: Any, timestep: Any) -> int | None:
        """The timestep as an int, or None if it is not a whole number.

        A view of `scheduler.timesteps`, as a loop over them yields it, is looked up without reading
        from its device.
        """
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1 or timestep.dtype not in (torch.int64, torch.int32):
                return None
            own = scheduler.timesteps
            place = _place(timestep, own) if isinstance(own, Tensor) else None
            return int(timestep) if place is None else self.numbers(scheduler, "timesteps")[place]
        return None if isinstance(timestep, float) else int(timestep)


def _place(view: Tensor, of: Tensor) -> int | None:
    """The index of a one-element view within a vector, or None if it is not a view of it."""
    if view.dtype is not of.dtype or of.ndim != 1 or of.stride(0) != 1 or of.is_inference():
        return None
    if view.untyped_storage().data_ptr() != of.untyped_storage().data_ptr():
        return None
    place = int(view.storage_offset()) - int(of.storage_offset())
    return place if 0 <= place < len(of) else None


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of one `step`; readers may assume that output and sample are tensors."""

    model_output: Any
    timestep: Any
    sample: Any
    generator: Any = None
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A second row, which starts from the sample that the first one corrects.

        corrected = x + of_last * last,    x'' = b corrected + of_estimate D + sum over `older`

    where x is the result and D the estimate of the first row.
    """

    last: Tensor
    of_last: float
    b: float
    of_estimate: float
    older: tuple[tuple[Tensor, float], ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """The row of one step (letters: module docstring)."""

    u: float
    v: float
    a: float
    b: float
    s: float = 0.0
    draws: bool = False
    """Whether diffusers draws noise in this step, even if its factor is 0."""
    clamp: float = math.inf
    log_variance: tuple[float, float] | None = None
    older: tuple[tuple[Tensor, float], ...] = ()
    """Tensors of the scheduler's state, newest first, or the model output; each with its factor."""
    keep: tuple[float, float] | None = None
    """(p, q): later steps need p x + q D."""
    sample: Tensor | None = None
    """x, if it is not the sample that was passed in."""
    then: Predictor | None = None


Reader = Callable[[Any, Call, Host], Step | str]


def clamp_of(scheduler: Any) -> float:
    config = scheduler.config
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else math.inf


def level_at(t: float, alpha_cumprod: float) -> Level | None:
    """None if alpha_cumprod is not in [0, 1]: betas above 1, or a schedule that overflowed."""
    if not 0 <= alpha_cumprod <= 1:
        return None
    return Level(t, alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5)


def estimate_at(level: Level, scheduler: Any) -> tuple[float, float] | None:
    """(u, v) in the variance-preserving space; None where x contains no information about x0."""
    prediction = PREDICTIONS[scheduler.config.prediction_type]
    if level.alpha == 0 and prediction == "eps":
        return None
    return to_denoised(level.alpha, level.sigma, prediction)


def exploding_estimate(sigma: float, scheduler: Any) -> tuple[float, float]:
    """(u, v) for x = x0 + sigma n (Karras et al. 2022)."""
    prediction = PREDICTIONS[scheduler.config.prediction_type]
    u, v = to_denoised(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma), prediction)
    return (u, v) if prediction == "x0" else (u / math.hypot(1, sigma), v)


def index_of(scheduler: Any, timestep: Any) -> int:
    """The step index of a scheduler with sigmas, looked up at its first step as in diffusers."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return int(scheduler.step_index)


def pair_at(scheduler: Any, index: int, host: Host) -> tuple[float, float] | None:
    """The sigmas at the start and end of a step, or None if there are none or it starts at 0."""
    sigmas = host.numbers(scheduler, "sigmas")
    if not 0 <= index < len(sigmas) - 1:
        return None
    now, to = sigmas[index], sigmas[index + 1]
    return (now, to) if 0 < now < math.inf and 0 <= to < math.inf else None


# --- DDIM, DDPM: functions of the output, the timestep and the sample ---


def read_ddim(scheduler: Any, call: Call, host: Host) -> Step | str:
    """DDIM (Song et al. 2021, eq. 12 and 16); the stride is T // steps for every spacing."""
    eta, steps = call.others.get("eta", 0.0), scheduler.num_inference_steps
    alphas = host.numbers(scheduler, "alphas_cumprod")
    t = host.timestep(scheduler, call.timestep)
    if steps is None or t is None or not 0 <= t < len(alphas):
        return "the timestep is not a training timestep"
    if not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        return "eta is not a number between 0 and 1"
    if eta > 0 and call.others.get("variance_noise") is not None:
        return "variance_noise is given"
    before = t - scheduler.config.num_train_timesteps // steps
    final = float(scheduler.final_alpha_cumprod)
    now, to = level_at(t, alphas[t]), level_at(before, alphas[before] if before >= 0 else final)
    estimate = None if now is None else estimate_at(now, scheduler)
    if now is None or to is None or estimate is None or now.sigma == 0 or to.alpha < now.alpha:
        return DEGENERATE
    row, clamp = ddim([now, to], eta=eta)[0], clamp_of(scheduler)
    if clamp == math.inf or call.others.get("use_clipped_model_output"):
        return _of_row(row, estimate, draws=eta > 0, clamp=clamp)
    direction = row.a * now.sigma  # factor of the noise estimate, which is not clamped
    of_x, of_output = {
        "eps": (0.0, 1.0),
        "v": (now.sigma, now.alpha),
        "x0": (1 / now.sigma, -now.alpha / now.sigma),
    }[PREDICTIONS[scheduler.config.prediction_type]]
    return Step(
        u=estimate[0],
        v=estimate[1],
        a=direction * of_x,
        b=to.alpha,
        s=row.s,
        draws=eta > 0,
        clamp=clamp,
        older=((call.model_output, direction * of_output),),
    )


def _of_row(row: Row, estimate: tuple[float, float], **more: Any) -> Step:
    return Step(u=estimate[0], v=estimate[1], a=row.a, b=row.b, **{"s": row.s, **more})


def read_ddpm(scheduler: Any, call: Call, host: Host) -> Step | str:
    """DDPM (Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, eq. 15 for learned variances)."""
    alphas = host.numbers(scheduler, "alphas_cumprod")
    t = host.timestep(scheduler, call.timestep)
    if t is None or not 0 <= t < len(alphas):
        return "the timestep is not a training timestep"
    before = t - 1
    if scheduler.custom_timesteps or scheduler.num_inference_steps:
        timesteps = host.numbers(scheduler, "timesteps")
        if t not in timesteps:
            return "the timestep is not in scheduler.timesteps"
        following = timesteps[timesteps.index(t) + 1 :]
        before = int(following[0]) if following else -1
    now = level_at(t, alphas[t])
    to = level_at(before, alphas[before]) if before >= 0 else CLEAN
    estimate, kind = None if now is None else estimate_at(now, scheduler), scheduler.variance_type
    if now is None or to is None or estimate is None or not to.alpha > now.alpha:
        return DEGENERATE
    if kind != scheduler.config.variance_type:
        return "variance_type was changed"
    if (kind == "learned_range") != (call.model_output.shape[1] == 2 * call.sample.shape[1]):
        return "the channels of model_output do not fit variance_type"
    beta = 1 - (now.alpha / to.alpha) ** 2
    small = max(beta * (to.sigma / now.sigma) ** 2, LEAST_VARIANCE)
    s, bounds = math.sqrt(beta if kind == "fixed_large" else small), None
    if kind == "learned_range":
        s, bounds = 1.0, (math.log(small), math.log(beta))
    noise = {"s": s, "log_variance": bounds} if t > 0 else {"s": 0.0}
    row = ddpm([now, to])[0]
    return _of_row(row, estimate, draws=t > 0, clamp=clamp_of(scheduler), **noise)


# --- Euler, Euler ancestral, Heun: in the variance-exploding space, by index ---


def whole(timestep: Any) -> bool:
    """Whether a timestep is of a type that diffusers' Euler schedulers reject."""
    return isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))


def read_euler(scheduler: Any, call: Call, host: Host) -> Step | str:
    """Euler (Karras et al. 2022, algorithm 1 without the correction)."""
    return _euler(scheduler, call, host, ancestral=False)


def read_euler_ancestral(scheduler: Any, call: Call, host: Host) -> Step | str:
    """Euler to sigma_down, then noise of sigma_up (k-diffusion)."""
    return _euler(scheduler, call, host, ancestral=True)


def _euler(scheduler: Any, call: Call, host: Host, *, ancestral: bool) -> Step | str:
    if whole(call.timestep):
        return "the timestep is an integer"
    if not scheduler.is_scale_input_called:
        return "scale_model_input was not called"
    if call.others.get("s_churn", 0.0):
        return "s_churn is not 0"
    sigmas = pair_at(scheduler, index_of(scheduler, call.timestep), host)
    if sigmas is None or (ancestral and sigmas[1] > sigmas[0]):
        return DEGENERATE
    now, to = sigmas
    up = to * math.sqrt(1 - (to / now) ** 2) if ancestral else 0.0
    a = math.sqrt(to**2 - up**2) / now
    u, v = exploding_estimate(now, scheduler)
    return Step(u=u, v=v, a=a, b=1 - a, s=up, draws=ancestral)


def read_heun(scheduler: Any, call: Call, host: Host) -> Step | str:
    """Heun (Karras et al. 2022, algorithm 1): an Euler step, then its correction."""
    index, first = index_of(scheduler, call.timestep), scheduler.state_in_first_order
    sigmas = pair_at(scheduler, index if first else index - 1, host)
    if sigmas is None or (not first and sigmas[1] == 0):
        return DEGENERATE
    now, to = sigmas
    u, v = exploding_estimate(now if first else to, scheduler)
    clamp = clamp_of(scheduler)
    if first:  # d = (x - D) / sigma
        return Step(u=u, v=v, a=to / now, b=1 - to / now, clamp=clamp, keep=(1 / now, -1 / now))
    half = float(scheduler.dt) / 2  # x' = start + (d + (x - D) / sigma') dt / 2
    older = ((scheduler.prev_derivative, half), (scheduler.sample, 1.0))
    return Step(u=u, v=v, a=half / to, b=-half / to, clamp=clamp, older=older)


# --- PNDM, DPM-Solver++: with a history ---


def read_pndm(scheduler: Any, call: Call, host: Host) -> Step | str:
    """PNDM's linear multistep (Liu et al. 2022, eq. 11 and 12).

    x' = c x + g e, where e is a combination of the last outputs, so D is the output itself. As in
    PLMS, the first step is taken twice.
    """
    alphas, steps = host.numbers(scheduler, "alphas_cumprod"), scheduler.num_inference_steps
    t = host.timestep(scheduler, call.timestep)
    if steps is None or t is None:
        return "the timestep is not a training timestep"
    stride = scheduler.config.num_train_timesteps // steps
    before, counter, x = t - stride, scheduler.counter, call.sample
    older = list(scheduler.ets[-3:])
    if counter == 1:  # redo the first step from its start
        before, t, x, older = t, t + stride, scheduler.cur_sample, list(scheduler.ets)
        if len(older) != 1 or x is None:
            return "its history was changed"
        weights: tuple[float, ...] = (0.5, 0.5)
    else:
        weights = ADAMS_BASHFORTH[len(older)]
    if not 0 <= t < len(alphas) or before >= len(alphas):
        return "the timestep is not a training timestep"
    now, to = alphas[t], alphas[before] if before >= 0 else float(scheduler.final_alpha_cumprod)
    if not (0 < now <= 1 and 0 <= to <= 1):
        return DEGENERATE
    root = math.sqrt(now * (1 - now) * to)
    if (denominator := now * math.sqrt(1 - to) + root) == 0:
        return DEGENERATE
    g, a = -(to - now) / denominator, math.sqrt(to / now)
    if scheduler.config.prediction_type == "v_prediction":  # the combined output is a v at x
        a, g = a + g * math.sqrt(1 - now), g * math.sqrt(now)
    return Step(
        u=0.0,
        v=1.0,
        a=a,
        b=g * weights[0],
        older=tuple(zip(reversed(older), (g * w for w in weights[1:]), strict=True)),
        keep=None if counter == 1 else (0.0, 1.0),
        sample=x,
    )


def read_dpm(scheduler: Any, call: Call, host: Host) -> Step | str:  # noqa: PLR0911
    """DPM-Solver++(2M) and its SDE form (Lu et al. 2022b)."""
    if scheduler.num_inference_steps is None:
        return "set_timesteps was not called"
    noisy = scheduler.config.algorithm_type == "sde-dpmsolver++"
    if noisy and call.others.get("variance_noise") is not None:
        return "variance_noise is given"
    index = index_of(scheduler, call.timestep)
    pair, order = pair_at(scheduler, index, host), _order(scheduler, index)
    if pair is None or pair[1] > pair[0]:
        return DEGENERATE
    now, to = (exploded(sigma) for sigma in pair)
    estimate, eta = estimate_at(now, scheduler), float(noisy)
    assert estimate is not None, "alpha is 1 / sqrt(1 + sigma**2)"
    first = _of_row(dpmpp_2m_sde([now, to], eta=eta)[0], estimate, draws=noisy, keep=(0.0, 1.0))
    sigmas = host.numbers(scheduler, "sigmas")
    earlier, before = scheduler.model_outputs[-1], sigmas[index - 1]
    repeated = now == to and index == len(scheduler.timesteps) - 1 and before > pair[0]
    if order == 1 or (repeated and earlier is not None):  # x stays at a repeated last level
        return first
    if earlier is None or not before > pair[0] > pair[1] > 0:  # also if index is 0
        return DEGENERATE
    levels, kind = [exploded(before), now, to], scheduler.config.solver_type
    older: tuple[tuple[Tensor, float], ...]
    if order == 2:
        row = dpmpp_2m_sde(levels, eta=eta, lower_order_final=False, solver_type=kind)[1]
        older = ((earlier, row.c[0]),)
        return _of_row(row, estimate, draws=noisy, keep=(0.0, 1.0), older=older)
    if noisy:
        return "the SDE of order 3 has another sign in diffusers than in k-diffusion"
    second = scheduler.model_outputs[-2]
    if second is None or index < 2 or not (first_sigma := sigmas[index - 2]) > before:
        return DEGENERATE
    row = dpmpp_3m_sde([exploded(first_sigma), *levels], eta=eta)[2]
    older = ((earlier, row.c[1]), (second, row.c[0]))
    return _of_row(row, estimate, draws=noisy, keep=(0.0, 1.0), older=older)


def _order(scheduler: Any, index: int) -> int:
    """Order of a step of DPM-Solver++: 1 without a history and, with most options, at the end."""
    config, steps = scheduler.config, len(scheduler.timesteps)
    first_at_end = (
        config.get("euler_at_final")
        or (config.lower_order_final and steps < 15)
        or config.get("final_sigmas_type", "zero") == "zero"
    )
    low = scheduler.lower_order_nums < 1 or (index == steps - 1 and first_at_end)
    if low or config.solver_order < 3:
        return 1 if low else int(config.solver_order)
    second_at_end = index == steps - 2 and config.lower_order_final and steps < 15
    return 2 if scheduler.lower_order_nums < 2 or second_at_end else 3


def exploded(sigma: float) -> Level:
    """The level for a given sigma / alpha."""
    alpha = 1 / math.hypot(1, sigma)
    return Level(-1.0, alpha, sigma * alpha)


# --- how a step updates the state of the scheduler ---

Writer = Callable[[Any, Call, Tensor, "Tensor | None"], None]
"""(scheduler, call, x0 estimate, kept tensor); a corrected sample is in place of the call's."""


def write_nothing(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """DDIM and DDPM have no state."""


def write_index(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Advance the index into the sigmas."""
    scheduler._step_index += 1


def write_heun(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Store the slope and the start of the step, or clear them after its correction."""
    index = scheduler.step_index
    if kept is not None:
        scheduler.prev_derivative, scheduler.sample = kept, call.sample
        scheduler.dt = scheduler.sigmas[index + 1] - scheduler.sigmas[index]
    else:
        scheduler.prev_derivative = scheduler.sample = scheduler.dt = None
    scheduler._step_index += 1


def write_pndm(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Append to the last outputs."""
    if scheduler.counter != 1:
        scheduler.ets = [*scheduler.ets[-3:], call.model_output]
    if scheduler.counter == 0 and len(scheduler.ets) == 1:
        scheduler.cur_sample = call.sample
    elif scheduler.counter == 1:
        scheduler.cur_sample = None
    scheduler.counter += 1


def write_dpm(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Append to the last estimates of x0."""
    outputs = scheduler.model_outputs
    outputs[:] = [*outputs[1:], denoised]
    scheduler.lower_order_nums = min(scheduler.lower_order_nums + 1, scheduler.config.solver_order)
    scheduler._step_index += 1


class Kind(NamedTuple):
    """How one of diffusers' schedulers is fused."""

    read: Reader
    write: Writer
    allowed: dict[str, tuple[Any, ...]]
    """Option -> the values that the reader supports; the scheduler's numbers reflect all others."""
    state: Callable[[Call, Tensor], Tensor | None] = lambda call, denoised: None
    """The scheduler's own tensor with the value that `Step.keep` keeps; None: the kept tensor."""
    dtype: Literal["widest", "output", "estimate", "sample"] = "widest"
    """dtype of the next sample: the wider one of sample and output; the output's (Euler, which
    converts the sample to fp32 first); that of the x0 estimate (DPM-Solver++: noise in fp32); or
    the sample's (UniPC)."""
    copies: bool = False
    """Whether the kept tensor is copied out of its slot, because it stays when that is reused."""
    second: str | None = None
    """The output's field for the kept tensor, if steps return it."""
    doubled: bool = False
    """Whether model_output may have 2C channels, the second half being a learned variance."""


PREDICTS = {"prediction_type": ("epsilon", "v_prediction", "sample")}
KINDS = {
    "DDIMScheduler": Kind(read_ddim, write_nothing, {**PREDICTS, "thresholding": (False,)}),
    "DDPMScheduler": Kind(
        read_ddpm,
        write_nothing,
        {
            **PREDICTS,
            "thresholding": (False,),
            "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
        },
        doubled=True,
    ),
    "EulerDiscreteScheduler": Kind(
        read_euler, write_index, {"prediction_type": tuple(PREDICTIONS)}, dtype="output"
    ),
    "EulerAncestralDiscreteScheduler": Kind(
        read_euler_ancestral,
        write_index,
        {"prediction_type": ("epsilon", "v_prediction")},
        dtype="output",
    ),
    "HeunDiscreteScheduler": Kind(read_heun, write_heun, PREDICTS),
    "PNDMScheduler": Kind(
        read_pndm,
        write_pndm,
        {"prediction_type": ("epsilon", "v_prediction"), "skip_prk_steps": (True,)},
        lambda call, denoised: call.model_output,
    ),
    "DPMSolverMultistepScheduler": Kind(
        read_dpm,
        write_dpm,
        {
            **PREDICTS,
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_order": (1, 2, 3),
            "solver_type": ("midpoint", "heun"),
            "thresholding": (False,),
            "variance_type": (None, "fixed_small", "fixed_large"),
            "use_flow_sigmas": (False,),
        },
        lambda call, denoised: denoised,
        dtype="estimate",
    ),
}
"""diffusers' class -> how it is fused."""
