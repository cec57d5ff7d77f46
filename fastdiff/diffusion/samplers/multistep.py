"""Samplers that keep earlier evaluations: one evaluation per step, and up to three in history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from fastdiff.diffusion.levels import Level
from fastdiff.diffusion.samplers.rows import (
    NO_SLOT,
    Row,
    SolverType,
    check_choice,
    check_eta,
    eps_weights,
    out_of_noise,
    repeats,
    sampler,
)

ADAMS_BASHFORTH = (
    (1.0,),
    (1.5, -0.5),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the last slopes, the newest first, of equal steps."""


def eps_row(now: Level, to: Level, step: int, gains: Sequence[float]) -> Row:
    """x' = alpha' / alpha * x + sum of gains_i * eps_hat of i steps before; keeps eps_hat.

    eps_hat of step n is in slot n % 3.
    """
    newest, *older = gains
    c = [0.0, 0.0, 0.0]
    for back, gain in enumerate(older, start=1):
        c[(step - back) % 3] = gain
    a, b = eps_weights(now, newest)
    p, q = eps_weights(now, 1.0)
    return Row(
        at=now,
        step=step,
        a=to.alpha / now.alpha + a,
        b=b,
        c=(c[0], c[1], c[2]),
        slot=step % 3,
        p=p,
        q=q,
    )


def _gain(now: Level, to: Level) -> float:
    """The factor g of eps_hat in an Euler step, x' = alpha' / alpha * x + g * eps_hat."""
    return to.sigma - now.sigma * (to.alpha / now.alpha)


@sampler("plms", order=2, needs_signal=True)
def plms(levels: Sequence[Level]) -> list[Row]:
    """Pseudo linear multistep (PNDM, Liu et al. 2022, F-PNDM), started as in Stable Diffusion.

    x' = alpha' / alpha * x + g * e, where g = sigma' - sigma * alpha' / alpha and e is a
    combination of the last four eps_hat. The first step is taken twice, so there is one more row
    than steps: row 1 evaluates the network at the end of the step and redoes the step with the mean
    slope, x + g * (e_1 - e_0) / 2, because x already contains g * e_0. If the first step starts
    from nearly pure noise (`OUT_OF_NOISE`), it is an Euler step, and the second is taken twice.
    """
    rows: list[Row] = []
    start = 1 if out_of_noise(levels[0], levels[1]) else 0
    for step, (now, to) in enumerate(pairwise(levels)):
        g = _gain(now, to)
        weights = ADAMS_BASHFORTH[min(max(step - start, 0), 3)]
        rows.append(eps_row(now, to, step, [g * weight for weight in weights]))
        if step == start and to.sigma > 0:
            a, b = eps_weights(to, g / 2)
            c = [0.0, 0.0, 0.0]
            c[step % 3] = -g / 2
            rows.append(Row(at=to, step=step, a=1 + a, b=b, c=(c[0], c[1], c[2])))
    return rows


@sampler("ipndm", order=2, needs_signal=True)
def ipndm(levels: Sequence[Level]) -> list[Row]:
    """Improved pseudo linear multistep (Zhang and Chen 2023): PLMS that starts with lower orders.

    The first steps use as many eps_hat as there are, so there is one row per step. The weights are
    those of equal steps (PNDM, Liu et al. 2022, eq. 12).
    """
    start = 1 if out_of_noise(levels[0], levels[1]) else 0
    return [
        eps_row(
            now,
            to,
            step,
            [_gain(now, to) * w for w in ADAMS_BASHFORTH[min(max(step - start, 0), 3)]],
        )
        for step, (now, to) in enumerate(pairwise(levels))
    ]


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


def lagrange_integrals(
    sigmas: Sequence[float], to: float, scale: Literal["linear", "log"]
) -> list[float]:
    """w_i with integral of P from sigmas[0] to `to` = sum of w_i * P(sigmas[i]).

    P is the polynomial in sigma ("linear") or in log sigma ("log") through its values at sigmas.
    The quadrature is exact for "linear", and to rounding for "log".
    """
    start = sigmas[0]
    if scale == "linear":
        knots, ends = np.array(sigmas), (start, to)
        u = (ends[0] + ends[1]) / 2 + (ends[1] - ends[0]) / 2 * _NODES
        density = np.full_like(u, (ends[1] - ends[0]) / 2)
    else:
        knots, length = np.log(np.array(sigmas)), math.log(to / start)
        u = math.log(start) + length / 2 * (1 + _NODES)
        density = np.exp(u) * length / 2
    result = []
    for number, knot in enumerate(knots):
        others = np.delete(knots, number)
        basis = np.prod((u[:, None] - others) / (knot - others), axis=1)
        result.append(float((_WEIGHTS * density * basis).sum()))
    return result


@sampler("lms", order=2, needs_signal=True)
def lms(levels: Sequence[Level], *, solver_order: int = 4) -> list[Row]:
    """Linear multistep in sigma / alpha, as in k-diffusion (rhoAB-DEIS: Zhang and Chen 2023).

    y' = y + integral of P from sigma_ve to sigma_ve', where y = x / alpha and P is the polynomial
    through the last `solver_order` (1 to 4) slopes d = eps_hat at their sigma_ve. A step with its
    whole history is of order `solver_order`; the first steps have fewer, and the error of the
    first, an Euler step, falls with its square.
    """
    return _adams(levels, solver_order, "linear", lower_order_final=False)


@sampler("deis", order=2, needs_signal=True)
def deis(
    levels: Sequence[Level], *, solver_order: int = 3, lower_order_final: bool = False
) -> list[Row]:
    """DEIS (Zhang and Chen 2023, eq. 14 and 15), with polynomials in log(sigma / alpha).

    x' = alpha' / alpha * x + alpha' * integral of P over sigma / alpha, where P goes through the
    last `solver_order` (1 to 4) eps_hat. A step with its whole history is of order `solver_order`;
    the first steps have fewer, and the error of the first, an Euler step, falls with its square.
    The step to sigma = 0 is an Euler step, because log 0 is infinite. With lower_order_final the
    order falls to 1 towards the end.
    """
    return _adams(levels, solver_order, "log", lower_order_final=lower_order_final)


def _adams(
    levels: Sequence[Level],
    order: int,
    scale: Literal["linear", "log"],
    *,
    lower_order_final: bool,
) -> list[Row]:
    check_choice("solver_order", order, (1, 2, 3, 4))
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        count = min(order, step + 1)
        if lower_order_final:
            count = min(count, len(levels) - 1 - step)
        if to.sigma == 0 and scale == "log":
            count = 1
        if count == 1:
            rows.append(eps_row(now, to, step, [_gain(now, to)]))
            continue
        sigmas = [levels[step - back].ve_sigma for back in range(count)]
        weights = lagrange_integrals(sigmas, to.ve_sigma, scale)
        rows.append(eps_row(now, to, step, [to.alpha * w for w in weights]))
    return rows


@sampler("dpmpp-2m", order=2)
def dpmpp_2m(
    levels: Sequence[Level],
    *,
    lower_order_final: bool = True,
    solver_type: SolverType = "midpoint",
) -> list[Row]:
    """DPM-Solver++(2M): order 2, one evaluation per step (Lu et al. 2022b, algorithm 2)."""
    return dpmpp_2m_sde(
        levels, eta=0.0, lower_order_final=lower_order_final, solver_type=solver_type
    )


@sampler("dpmpp-2m-sde", order=2)
def dpmpp_2m_sde(
    levels: Sequence[Level],
    *,
    eta: float = 1.0,
    lower_order_final: bool = True,
    solver_type: SolverType = "midpoint",
) -> list[Row]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b; midpoint form) with k-diffusion's eta.

    h is half the step in log-SNR, so e^-h = sigma_ve' / sigma_ve; r = h_previous / h.

        x' = sigma' / sigma * e^(-eta h) * x
             + alpha' * (1 - e^(-(1 + eta) h)) * (D + (D - D_previous) / (2 r))
             + sigma' * sqrt(1 - e^(-2 eta h)) * noise

    solver_type "heun" weights the slope (D - D_previous) / r as its integral has it, with
    alpha' * (1 - (1 - e^-H) / H), H = (1 + eta) h, in place of half the factor of D. The first step
    and, with lower_order_final, the last one are of order 1. The last one has to be if it ends at
    sigma = 0, where h is infinite.
    """
    check_eta(eta)
    check_choice("solver_type", solver_type, ("midpoint", "heun"))
    rows: list[Row] = []
    for step, (now, to) in enumerate(pairwise(levels)):
        decay = to.sigma * now.alpha / (to.alpha * now.sigma)  # e^-h without infinities
        b = to.alpha * (1 - decay ** (1 + eta))
        last = step == len(levels) - 2
        extrapolation = 0.0
        if step > 0 and not (last and (lower_order_final or to.sigma == 0)):
            h, h_before = -math.log(decay), math.log(levels[step - 1].ve_sigma / now.ve_sigma)
            extrapolation = h / h_before / 2
            if solver_type == "heun" and h:
                extrapolation *= 2 * (to.alpha / b - 1 / ((1 + eta) * h))
        rows.append(
            Row(
                at=now,
                step=step,
                a=to.sigma / now.sigma * decay**eta,
                b=b * (1 + extrapolation),
                c=(-b * extrapolation, 0.0, 0.0),
                s=to.sigma * math.sqrt(1 - decay ** (2 * eta)),
                slot=NO_SLOT if last else 0,
                p=0.0,
                q=0.0 if last else 1.0,
            )
        )
    return rows


@sampler("dpmpp-3m", order=2)
def dpmpp_3m(
    levels: Sequence[Level],
    *,
    lower_order_final: bool = False,
    solver_type: SolverType = "heun",
) -> list[Row]:
    """DPM-Solver++(3M): three estimates per step (Lu et al. 2022b, as in the authors' code).

    It is dpmpp-3m-sde without noise.
    """
    return dpmpp_3m_sde(
        levels, eta=0.0, lower_order_final=lower_order_final, solver_type=solver_type
    )


@sampler("dpmpp-3m-sde", order=2)
def dpmpp_3m_sde(
    levels: Sequence[Level],
    *,
    eta: float = 1.0,
    lower_order_final: bool = False,
    solver_type: SolverType = "heun",
) -> list[Row]:
    """SDE-DPM-Solver++(3M) (Lu et al. 2022b; k-diffusion's dpmpp_3m_sde): three estimates per step.

    With H = (1 + eta) h, phi_2 = 1 - (1 - e^-H) / H and phi_3 = phi_2 / H - 1 / 2,

        x' = sigma' / sigma * e^(-eta h) * x + alpha' * ((1 - e^-H) * D + phi_2 d1 - phi_3 d2)
             + sigma' * sqrt(1 - e^(-2 eta h)) * noise

    where d1 and d2 are h D' and h² D'' / 2 of the parabola through the last three D. The published
    code, and so this, has phi_3 where the integral of h² D'' / 2 has 2 phi_3: the order is that of
    2M, with a smaller error. The second step, and with lower_order_final the last but one, is 2M's
    with solver_type; the first, the step to sigma = 0 and with lower_order_final the last are of
    order 1.
    """
    check_eta(eta)
    steps = len(levels) - 1
    rows: list[Row] = []
    for step, (now, to) in enumerate(pairwise(levels)):
        order = min(3, step + 1, steps - step if lower_order_final else 3)
        if to.sigma == 0 or repeats(now, to):
            order = 1
        if order < 3:
            near = levels[max(step - 1, 0) : step + 2] if order == 2 else [now, to]
            row = dpmpp_2m_sde(near, eta=eta, lower_order_final=False, solver_type=solver_type)[-1]
            a, s, weights = row.a, row.s, [row.b, row.c[0]]
        else:
            a, s, weights = _third_order(levels[step - 2 : step + 2], eta)
        rows.append(_estimate_row(now, step, a, weights, s=s))
    return rows


def _third_order(levels: Sequence[Level], eta: float) -> tuple[float, float, list[float]]:
    """The factors of x and of the noise, and those of the last three D, newest first."""
    before, last, now, to = levels
    decay = to.ve_sigma / now.ve_sigma
    h = -math.log(decay)
    r0, r1 = (
        math.log(last.ve_sigma / now.ve_sigma) / h,
        math.log(before.ve_sigma / last.ve_sigma) / h,
    )
    gain = 1 - decay ** (1 + eta)
    phi_2 = 1 - gain / ((1 + eta) * h)
    phi_3 = phi_2 / ((1 + eta) * h) - 0.5
    # d1 = e0 + (e0 - e1) r0 / (r0 + r1) and d2 = (e0 - e1) / (r0 + r1), with e0 = (D - D1) / r0
    # and e1 = (D1 - D2) / r1
    bend = (phi_2 * r0 - phi_3) / (r0 + r1)  # the factor of e0 - e1
    of_e0, of_e1 = phi_2 + bend, -bend
    weights = [gain + of_e0 / r0, of_e1 / r1 - of_e0 / r0, -of_e1 / r1]
    a = to.sigma / now.sigma * decay**eta
    s = to.sigma * math.sqrt(1 - decay ** (2 * eta))
    return a, s, [to.alpha * weight for weight in weights]


def _estimate_row(
    now: Level, step: int, a: float, weights: Sequence[float], *, s: float = 0.0
) -> Row:
    """x' = a * x + sum of weights_i * D of i steps before + s * noise; keeps D.

    D of step n is in slot n % 3.
    """
    newest, *older = weights
    c = [0.0, 0.0, 0.0]
    for back, weight in enumerate(older, start=1):
        c[(step - back) % 3] = weight
    return Row(
        at=now, step=step, a=a, b=newest, c=(c[0], c[1], c[2]), s=s, slot=step % 3, p=0.0, q=1.0
    )


@sampler("unipc", order=2)
def unipc(
    levels: Sequence[Level],
    *,
    solver_order: int = 2,
    solver_type: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
) -> list[Row]:
    """UniPC (Zhao et al. 2023, algorithms 5 and 6): a predictor and a corrector, one evaluation.

    The evaluation at a predicted x also corrects it, and the next prediction starts from the
    corrected x. Both are sigma' / sigma times the x before, corrected, plus a combination of D, so
    x - corrected x is a combination of D: x alone is kept, and no row needs the corrected one.
    The order of step n is at most n + 1 and, with lower_order_final, the number of steps left; the
    step to sigma = 0 is of order 1. Without lower_order_final it converges with order
    `solver_order` (1 to 3) plus 1, thanks to the corrector; with it, the last step limits it to 2.

    solver_type: B(h) is h for "bh1" and e^h - 1 for "bh2".
    """
    check_choice("solver_order", solver_order, (1, 2, 3))
    check_choice("solver_type", solver_type, ("bh1", "bh2"))
    steps, predicted, order = len(levels) - 1, list[float](), 0
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        correction = [0.0]  # of x, by D of this step and earlier ones, newest first
        if predicted and levels[step - 1].alpha:
            corrected = unipc_weights(levels[: step + 1], order, solver_type, corrects=True)
            correction = [corrected[0]]
            correction += [new - old for new, old in zip(corrected[1:], predicted, strict=True)]
        usable = step + 1 if levels[0].alpha else max(step, 1)  # where log-SNR is finite
        order = min(solver_order, usable, steps - step if lower_order_final else solver_order)
        if to.sigma == 0 or repeats(now, to):
            order = 1
        predicted = unipc_weights(levels[: step + 2], order, solver_type, corrects=False)
        keep = to.sigma / now.sigma
        length = max(len(correction), len(predicted))
        weights = [
            keep * part + new
            for part, new in zip(
                correction + [0.0] * (length - len(correction)),
                predicted + [0.0] * (length - len(predicted)),
                strict=True,
            )
        ]
        rows.append(_estimate_row(now, step, keep, weights))
    return rows


def unipc_weights(
    levels: Sequence[Level], order: int, solver_type: Literal["bh1", "bh2"], *, corrects: bool
) -> list[float]:
    """w with x' = sigma' / sigma * x + sum of w_i * D_i for the step from levels[-2] to levels[-1].

    D_i are estimates at the levels, newest first: from levels[-1] on for the corrector, UniC, and
    from levels[-2] on for the predictor, UniP (Zhao et al. 2023, eq. 3 and appendix D.2, for x0).
    """
    now, to = levels[-2], levels[-1]
    decay = to.ve_sigma / now.ve_sigma
    if order == 1 and not corrects:
        return [to.alpha * (1 - decay)]
    h = -math.log(decay)
    nodes = [math.log(now.ve_sigma / level.ve_sigma) / h for level in levels[-3 : -2 - order : -1]]
    b_h = -h if solver_type == "bh1" else decay - 1
    phi, moments, factorial = (decay - 1) / -h - 1, list[float](), 1
    for k in range(1, order + 1):
        moments.append(phi * factorial / b_h)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    if corrects:
        nodes.append(1.0)
    rhos = [0.5]  # as the authors' code has it where one rho is left
    if len(nodes) > 1:
        powers = np.array([[node**k for node in nodes] for k in range(len(nodes))])
        rhos = np.linalg.solve(powers, np.array(moments[: len(nodes)])).tolist()
    slopes = [-to.alpha * b_h * rho / node for rho, node in zip(rhos, nodes, strict=True)]
    weights = [to.alpha * (1 - decay) - sum(slopes), *slopes]
    return [weights[-1], *weights[:-1]] if corrects else weights
