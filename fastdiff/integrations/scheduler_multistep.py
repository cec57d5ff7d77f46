"""diffusers' UniPC, DEIS and iPNDM as rows of `sampler_step`.

Readers and writers are as in `scheduler_rows`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastdiff.diffusion.samplers.multistep import (
    ADAMS_BASHFORTH,
    lagrange_integrals,
    unipc_weights,
)
from fastdiff.integrations.scheduler_rows import (
    DEGENERATE,
    PREDICTIONS,
    Call,
    Host,
    Kind,
    Predictor,
    Step,
    estimate_at,
    exploded,
    index_of,
    pair_at,
    write_dpm,
)
from fastdiff.integrations.scheduler_solvers import CHANGED, SOLVES, descending

# --- UniPC: a corrector and a predictor ---


def read_unipc(scheduler: Any, call: Call, host: Host) -> Step | str:
    """UniPC (Zhao et al. 2023, algorithms 5 and 6), for x0.

    Without a corrector, as in the first step, it is one row. Otherwise the first row estimates x0
    and weighs the corrector's estimates, and the second one predicts (`Predictor`).
    """
    if scheduler.num_inference_steps is None:
        return "set_timesteps was not called"
    index = index_of(scheduler, call.timestep)
    pair, sigmas = pair_at(scheduler, index, host), host.numbers(scheduler, "sigmas")
    if pair is None or pair[1] > pair[0]:
        return DEGENERATE
    estimate = estimate_at(exploded(pair[0]), scheduler)
    assert estimate is not None, "alpha is 1 / sqrt(1 + sigma**2)"
    order, last = order_of_unipc(scheduler, index), scheduler.last_sample
    predicts = _weights(scheduler, sigmas, index + 1, order, corrects=False)
    if isinstance(predicts, str):
        return predicts
    keep, newest, older = predicts
    if index == 0 or index - 1 in scheduler.disable_corrector or last is None:
        return Step(u=estimate[0], v=estimate[1], a=keep, b=newest, older=older, keep=(0.0, 1.0))
    corrects = _weights(scheduler, sigmas, index, scheduler.this_order, corrects=True)
    if isinstance(corrects, str):
        return corrects
    of_last, of_estimate, corrected_by = corrects
    return Step(
        u=estimate[0],
        v=estimate[1],
        a=0.0,
        b=of_estimate,
        older=corrected_by,
        keep=(0.0, 1.0),
        then=Predictor(last=last, of_last=of_last, b=keep, of_estimate=newest, older=older),
    )


def order_of_unipc(scheduler: Any, index: int) -> int:
    """The order of the predictor, and of the corrector of the next step."""
    most = int(scheduler.config.solver_order)
    if scheduler.config.lower_order_final:
        most = min(most, len(scheduler.timesteps) - index)
    return min(most, scheduler.lower_order_nums + 1)


Weights = tuple[float, float, tuple[tuple[Tensor, float], ...]]


def _weights(
    scheduler: Any, sigmas: list[Any], to: int, order: int, *, corrects: bool
) -> Weights | str:
    """For the step to sigmas[to]: the factors of x and of this call's D, and earlier D with theirs.

    The corrector of a step is evaluated in the call that starts at its end.
    """
    known = descending(sigmas, to - 1, order)
    kind, end = scheduler.config.solver_type, float(sigmas[to])
    if known is None or end > known[0]:
        return DEGENERATE
    if end in (0, known[0]) and (corrects or order > 1):  # an infinite step, or none
        return DEGENERATE
    levels = [exploded(sigma) for sigma in (*reversed(known), end)]
    newest, *others = unipc_weights(levels, order, kind, corrects=corrects)
    outputs = scheduler.model_outputs[::-1][: len(others)]
    if len(outputs) < len(others) or any(output is None for output in outputs):
        return CHANGED
    keep = levels[-1].sigma / levels[-2].sigma
    return keep, newest, tuple(zip(outputs, others, strict=True))


def write_unipc(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Append to the last estimates of x0, and store the sample that the step started from."""
    outputs, timesteps = scheduler.model_outputs, scheduler.timestep_list
    outputs[:] = [*outputs[1:], denoised]
    timesteps[:] = [*timesteps[1:], call.timestep]
    scheduler.this_order = order_of_unipc(scheduler, scheduler.step_index)
    scheduler.last_sample = call.sample
    order = scheduler.config.solver_order
    scheduler.lower_order_nums = min(scheduler.lower_order_nums + 1, order)
    scheduler._step_index += 1


# --- DEIS: a polynomial through earlier estimates of the noise ---


def read_deis(scheduler: Any, call: Call, host: Host) -> Step | str:
    """DEIS (Zhang and Chen 2023, eq. 14 and 15), with polynomials in the logarithm of sigma.

    The weights are computed in fp64. diffusers computes them in fp32 from terms that cancel: of
    order 3 its own are off by up to 1e-4 of the sample.
    """
    if scheduler.num_inference_steps is None:
        return "set_timesteps was not called"
    index = index_of(scheduler, call.timestep)
    pair, order = pair_at(scheduler, index, host), _order_of_deis(scheduler, index)
    sigmas = descending(host.numbers(scheduler, "sigmas"), index, order)
    if pair is None or sigmas is None or not 0 < pair[1] <= pair[0]:
        return DEGENERATE
    now, to = (exploded(sigma) for sigma in pair)
    weights = lagrange_integrals(sigmas, pair[1], "log") if order > 1 else [pair[1] - pair[0]]
    older = scheduler.model_outputs[::-1][: order - 1]
    if any(output is None for output in older):
        return CHANGED
    u, v = {
        "eps": (0.0, 1.0),
        "v": (now.sigma, now.alpha),
        "x0": (1 / now.sigma, -now.alpha / now.sigma),
    }[PREDICTIONS[scheduler.config.prediction_type]]
    newest, *others = (to.alpha * weight for weight in weights)
    return Step(
        u=u,
        v=v,
        a=to.alpha / now.alpha,
        b=newest,
        older=tuple(zip(older, others, strict=True)),
        keep=(0.0, 1.0),
    )


def _order_of_deis(scheduler: Any, index: int) -> int:
    config, steps = scheduler.config, len(scheduler.timesteps)
    most = min(int(config.solver_order), scheduler.lower_order_nums + 1, 3)
    if config.lower_order_final and steps < 15:
        most = min(most, max(steps - index, 1))
    return most


# --- iPNDM: the weights of equal steps, on a schedule of its own ---


def read_ipndm(scheduler: Any, call: Call, host: Host) -> Step | str:
    """iPNDM (Zhang and Chen 2023; weights: Liu et al. 2022, eq. 12).

    x = alpha x0 + sigma n and the network returns v = alpha n - sigma x0, so n = sigma x + alpha v.
    The first step starts from alpha = 0, where x is n and says nothing about x0: diffusers divides
    x - n = 0 by 1e-8 there, so its estimate of x0 is 0.
    """
    index = index_of(scheduler, call.timestep)
    alphas, sigmas = (host.numbers(scheduler, name) for name in ("alphas", "betas"))
    if not 0 <= index < min(len(alphas), len(sigmas)) - 1:
        return DEGENERATE
    older = scheduler.ets[:-4:-1]
    weights = ADAMS_BASHFORTH[len(older)]
    (alpha, next_alpha), (sigma, next_sigma) = alphas[index : index + 2], sigmas[index : index + 2]
    if not all(map(math.isfinite, (alpha, next_alpha, sigma, next_sigma))):
        return DEGENERATE
    if alpha < 1e-8:
        if older or (alpha, sigma) != (0, 1):
            return DEGENERATE
        return Step(u=sigma, v=alpha, a=0.0, b=next_sigma, keep=(0.0, 1.0))
    ratio = next_alpha / alpha
    newest, *others = ((next_sigma - ratio * sigma) * weight for weight in weights)
    return Step(
        u=sigma,
        v=alpha,
        a=ratio,
        b=newest,
        older=tuple(zip(older, others, strict=True)),
        keep=(0.0, 1.0),
    )


def write_ipndm(scheduler: Any, call: Call, denoised: Tensor, kept: Tensor | None) -> None:
    """Append to all estimates of the noise."""
    scheduler.ets.append(denoised)
    scheduler._step_index += 1


MULTISTEP = {
    "UniPCMultistepScheduler": Kind(
        read_unipc,
        write_unipc,
        {
            **SOLVES,
            "predict_x0": (True,),
            "solver_order": (1, 2, 3),
            "solver_type": ("bh2", "bh1"),
            "solver_p": (None,),
        },
        lambda call, denoised: denoised,
        dtype="sample",
    ),
    "DEISMultistepScheduler": Kind(
        read_deis,
        write_dpm,
        {**SOLVES, "solver_order": (1, 2, 3), "algorithm_type": ("deis",)},
        lambda call, denoised: denoised,
    ),
    "IPNDMScheduler": Kind(read_ipndm, write_ipndm, {}, lambda call, denoised: denoised),
}
"""diffusers' class -> how it is fused; continues `scheduler_solvers.SOLVERS`."""
IPNDM_OPTIONS = ("num_train_timesteps", "trained_betas")
"""Options of diffusers' iPNDM, as of diffusers 0.42; both act through its numbers."""
