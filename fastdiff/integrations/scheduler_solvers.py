"""More of diffusers' schedulers as rows of `sampler_step`: solvers, distilled networks, flows.

Readers and writers are as in `scheduler_rows`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.samplers.distilled import SIGMA_DATA
from fastdiff.diffusion.samplers.multistep import lagrange_integrals
from fastdiff.diffusion.samplers.singlestep import solver_weights
from fastdiff.integrations.scheduler_rows import (
    DEGENERATE,
    PREDICTS,
    Call,
    Host,
    Kind,
    Step,
    clamp_of,
    estimate_at,
    exploded,
    exploding_estimate,
    index_of,
    level_at,
    pair_at,
    whole,
    write_index,
)

CHANGED = "its history was changed"


def descending(sigmas: list[Any], index: int, count: int) -> list[float] | None:
    """`count` sigmas up to `index`, newest first, or None if they do not ascend to the past."""
    if index + 1 < count:
        return None
    found = [float(sigma) for sigma in sigmas[index + 1 - count : index + 1]][::-1]
    fits = found[0] > 0 and all(a < b for a, b in pairwise(found))
    return found if fits and found[-1] < math.inf else None


# --- LMS: a polynomial through earlier slopes ---


def read_lms(scheduler: Any, call: Call, host: Host) -> Step | str:
    """LMS (k-diffusion): the polynomial in sigma through the last slopes, in the VE space."""
    if not scheduler.is_scale_input_called:
        return "scale_model_input was not called"
    most, index = call.others["order"], index_of(scheduler, call.timestep)
    if not isinstance(most, int) or not 1 <= most <= 4:
        return "order is not 1 to 4"
    pair, count = pair_at(scheduler, index, host), min(index + 1, most)
    sigmas = descending(host.numbers(scheduler, "sigmas"), index, count)
    if pair is None or sigmas is None:
        return DEGENERATE
    weights = lagrange_integrals(sigmas, pair[1], "linear")
    u, v = exploding_estimate(pair[0], scheduler)
    slope = (1 / pair[0], -1 / pair[0])
    return Step(
        u=u,
        v=v,
        a=1 + weights[0] * slope[0],
        b=weights[0] * slope[1],
        older=tuple(zip(reversed(scheduler.derivatives), weights[1:], strict=False)),
        keep=slope,
    )


def write_lms(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Append to the last slopes."""
    scheduler.derivatives.append(kept)
    if len(scheduler.derivatives) > call.others["order"]:
        scheduler.derivatives.pop(0)
    scheduler._step_index += 1


# --- DPM-Solver++ singlestep, KDPM2: several evaluations per step ---


def read_singlestep(scheduler: Any, call: Call, host: Host) -> Step | str:  # noqa: PLR0911
    """DPM-Solver++ on the grid of the timesteps (Lu et al. 2022b), from the start of its group."""
    if scheduler.num_inference_steps is None:
        return "set_timesteps was not called"
    index = index_of(scheduler, call.timestep)
    pair, outputs = pair_at(scheduler, index, host), scheduler.model_outputs
    every = host.numbers(scheduler, "sigmas")
    if pair is None or index >= len(scheduler.order_list):
        return DEGENERATE
    if any(a <= b for a, b in pairwise(every[:-1])):  # diffusers' result is NaN from there on
        return DEGENERATE
    order = scheduler.order_list[index]
    while order > 1 and outputs[-(order - 1)] is None:
        order -= 1
    sigmas = descending(every, index, order)
    if sigmas is None or (order > 1 and not 0 < pair[1] < sigmas[-1]):
        return DEGENERATE
    points, to = [exploded(sigma) for sigma in reversed(sigmas)], exploded(pair[1])
    estimate = estimate_at(points[-1], scheduler)
    assert estimate is not None, "alpha is 1 / sqrt(1 + sigma**2)"
    keep, weights = solver_weights(points, to, "x0", scheduler.config.solver_type)
    if order == 1:
        return Step(u=estimate[0], v=estimate[1], a=keep, b=weights[0], keep=(0.0, 1.0))
    if scheduler.sample is None:
        return CHANGED
    older = [(outputs[-back], weights[-1 - back]) for back in range(1, order)]
    return Step(
        u=estimate[0],
        v=estimate[1],
        a=0.0,
        b=weights[-1],
        older=(*older, (scheduler.sample, keep)),
        keep=(0.0, 1.0),
    )


def write_singlestep(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Append to the last estimates of x0, and store the start of a group."""
    outputs = scheduler.model_outputs
    order = scheduler.order_list[scheduler.step_index]
    while order > 1 and outputs[-(order - 1)] is None:
        order -= 1
    outputs[:] = [*outputs[1:], denoised]
    if order == 1:
        scheduler.sample = call.sample
    scheduler._step_index += 1


def read_kdpm2(scheduler: Any, call: Call, host: Host) -> Step | str:
    """KDPM2 (k-diffusion's dpm_2): the midpoint rule in log sigma, in the VE space."""
    return _kdpm2(scheduler, call, host, ancestral=False)


def read_kdpm2_ancestral(scheduler: Any, call: Call, host: Host) -> Step | str:
    """KDPM2 ancestral (k-diffusion's dpm_2_ancestral)."""
    return _kdpm2(scheduler, call, host, ancestral=True)


def _kdpm2(scheduler: Any, call: Call, host: Host, *, ancestral: bool) -> Step | str:
    index, first = index_of(scheduler, call.timestep), scheduler.state_in_first_order
    start = index if first else index - 1
    pair, middles = pair_at(scheduler, start, host), host.numbers(scheduler, "sigmas_interpol")
    if pair is None:
        return DEGENERATE
    now, to = pair
    middle = middles[start if ancestral else start + 1]
    if not (0 <= middle < math.inf and (first or middle > 0)):
        return DEGENERATE
    u, v = exploding_estimate(now if first else middle, scheduler)
    if first:
        return Step(u=u, v=v, a=middle / now, b=1 - middle / now)
    down = host.numbers(scheduler, "sigmas_down")[start] if ancestral else to
    s = host.numbers(scheduler, "sigmas_up")[start] if ancestral else 0.0
    length = down - now
    older = ((scheduler.sample, 1.0),)
    return Step(u=u, v=v, a=length / middle, b=-length / middle, s=s, draws=ancestral, older=older)


def write_kdpm2(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Store the start of a step, or clear it after its second half."""
    first, index = scheduler.state_in_first_order, scheduler.step_index
    scheduler.sample = call.sample if first else None
    if first and hasattr(scheduler, "sigmas_down"):  # the ancestral one keeps the length, unused
        scheduler.dt = scheduler.sigmas_interpol[index] - scheduler.sigmas[index]
    scheduler._step_index += 1


# --- LCM, TCD: networks distilled to few steps ---


def _ends(scheduler: Any, call: Call, host: Host, after_last: int) -> tuple[int, int, bool] | str:
    """The timestep, the next one, and whether this is the last step."""
    if scheduler.num_inference_steps is None:
        return "set_timesteps was not called"
    index, t = index_of(scheduler, call.timestep), host.timestep(scheduler, call.timestep)
    timesteps = host.numbers(scheduler, "timesteps")
    total = len(host.numbers(scheduler, "alphas_cumprod"))
    before = timesteps[index + 1] if index + 1 < len(timesteps) else after_last
    if t is None or not 0 <= t < total or not 0 <= before < total:
        return "the timestep is not a training timestep"
    return t, int(before), index == scheduler.num_inference_steps - 1


def read_lcm(scheduler: Any, call: Call, host: Host) -> Step | str:
    """LCM (Luo et al. 2023, algorithm 3); what is kept is the consistency function's value."""
    t = host.timestep(scheduler, call.timestep)
    ends = _ends(scheduler, call, host, -1 if t is None else t)
    if isinstance(ends, str):
        return ends
    now, to = (_level_of(scheduler, host, place) for place in ends[:2])
    estimate = None if now is None else estimate_at(now, scheduler)
    if now is None or to is None or estimate is None:
        return DEGENERATE
    scaled = ends[0] * scheduler.config.timestep_scaling
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    out = scaled / math.hypot(scaled, SIGMA_DATA)
    alpha, s = (1.0, 0.0) if ends[2] else (to.alpha, to.sigma)
    return Step(
        u=estimate[0],
        v=estimate[1],
        a=alpha * skip,
        b=alpha * out,
        s=s,
        draws=not ends[2],
        clamp=clamp_of(scheduler),
        keep=(skip, out),
    )


def write_lcm(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Advance the index, and set the constant that diffusers sets in each step."""
    scheduler.sigma_data = SIGMA_DATA
    scheduler._step_index += 1


def read_tcd(scheduler: Any, call: Call, host: Host) -> Step | str:
    """TCD (Zheng et al. 2024, algorithm 4); what is kept is the sample at s, before the noise."""
    ends, eta = _ends(scheduler, call, host, 0), call.others["eta"]
    if isinstance(ends, str):
        return ends
    if not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        return "eta is not a number between 0 and 1"
    s = int(torch.floor((1 - eta) * torch.tensor(ends[1])))  # in fp32, as diffusers' own
    now, to, low = (_level_of(scheduler, host, place) for place in (*ends[:2], s))
    estimate = None if now is None else estimate_at(now, scheduler)
    if now is None or to is None or low is None or estimate is None or not now.sigma * low.alpha:
        return DEGENERATE
    noisy = eta > 0 and not ends[2]
    ratio = to.alpha / low.alpha if noisy else 1.0
    p = low.sigma / now.sigma
    q = low.alpha - now.alpha * p
    return Step(
        u=estimate[0],
        v=estimate[1],
        a=ratio * p,
        b=ratio * q,
        s=math.sqrt(max(1 - ratio**2, 0.0)),
        draws=noisy,
        keep=(p, q),
    )


def _level_of(scheduler: Any, host: Host, timestep: int) -> Any:
    return level_at(timestep, host.numbers(scheduler, "alphas_cumprod")[timestep])


# --- flow matching: x = (1 - sigma) x0 + sigma n, and the network returns v = n - x0 ---


def read_flow_euler(scheduler: Any, call: Call, host: Host) -> Step | str:
    """Euler steps of dx / dsigma = v (Lipman et al. 2023; Esser et al. 2024)."""
    if whole(call.timestep):
        return "the timestep is an integer"
    if call.others.get("per_token_timesteps") is not None:
        return "per_token_timesteps are given"
    index, sigmas = index_of(scheduler, call.timestep), host.numbers(scheduler, "sigmas")
    if not 0 <= index < len(sigmas) - 1:
        return DEGENERATE
    return Step(u=0.0, v=1.0, a=1.0, b=sigmas[index + 1] - sigmas[index])


def read_flow_heun(scheduler: Any, call: Call, host: Host) -> Step | str:
    """Heun's method for dx / dsigma = v: an Euler step, then its correction."""
    if whole(call.timestep):
        return "the timestep is an integer"
    if call.others.get("s_churn", 0.0):
        return "s_churn is not 0"
    index, first = index_of(scheduler, call.timestep), scheduler.state_in_first_order
    sigmas = host.numbers(scheduler, "sigmas")
    start = index if first else index - 1
    if not 0 <= start < len(sigmas) - 1:
        return DEGENERATE
    now, to = sigmas[start], sigmas[start + 1]
    if (now if first else to) == 0:  # diffusers divides v sigma by sigma
        return DEGENERATE
    if first:
        return Step(u=0.0, v=1.0, a=1.0, b=to - now, keep=(0.0, 1.0))
    half = float(scheduler.dt) / 2
    older = ((scheduler.prev_derivative, half), (scheduler.sample, 1.0))
    return Step(u=0.0, v=1.0, a=0.0, b=half, older=older)


def write_flow_heun(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Store the slope and the start of the step, or clear them after its correction."""
    index = scheduler.step_index
    if kept is not None:
        scheduler.prev_derivative, scheduler.sample = kept, call.sample.to(torch.float32)
        scheduler.dt = scheduler.sigmas[index + 1] - scheduler.sigmas[index]
    else:
        scheduler.prev_derivative = scheduler.sample = scheduler.dt = None
    scheduler._step_index += 1


SOLVES = {**PREDICTS, "thresholding": (False,), "use_flow_sigmas": (False,)}
SOLVERS = {
    "LMSDiscreteScheduler": Kind(read_lms, write_lms, PREDICTS, copies=True),
    "DPMSolverSinglestepScheduler": Kind(
        read_singlestep,
        write_singlestep,
        {
            **SOLVES,
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (1, 2, 3),
            "solver_type": ("midpoint", "heun"),
            "variance_type": (None,),
        },
        lambda call, denoised: denoised,
    ),
    "KDPM2DiscreteScheduler": Kind(
        read_kdpm2, write_kdpm2, {"prediction_type": ("epsilon", "v_prediction")}
    ),
    "KDPM2AncestralDiscreteScheduler": Kind(
        read_kdpm2_ancestral, write_kdpm2, {"prediction_type": ("epsilon", "v_prediction")}
    ),
    "LCMScheduler": Kind(
        read_lcm, write_lcm, {**PREDICTS, "thresholding": (False,)}, second="denoised"
    ),
    "TCDScheduler": Kind(
        read_tcd, write_index, {**PREDICTS, "thresholding": (False,)}, second="pred_noised_sample"
    ),
    "FlowMatchEulerDiscreteScheduler": Kind(
        read_flow_euler, write_index, {"stochastic_sampling": (False,)}, dtype="output"
    ),
    "FlowMatchHeunDiscreteScheduler": Kind(read_flow_heun, write_flow_heun, {}, dtype="output"),
}
"""diffusers' class -> how it is fused; continues `scheduler_rows.KINDS`."""
REFUSED = {"DPMSolverSDEScheduler": "its noise is torchsde's Brownian tree"}
"""diffusers' class that a sampler of ours equals -> why its step is not a row."""
FLOW_OPTIONS = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "invert_sigmas", "shift_terminal",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "time_shift_type",
    "stochastic_sampling",
)  # fmt: skip
"""Options of the flow-matching schedulers, as of diffusers 0.42; all but the last act through the
sigmas."""
