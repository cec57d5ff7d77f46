"""Samplers that evaluate the network several times within a step, and then forget.

The levels in the middle of a step lie between those of the spacing, so these samplers need the
noise schedule to find their timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from fastdiff.diffusion.levels import Level, levels_of_sigmas
from fastdiff.diffusion.samplers.rows import (
    Churn,
    Row,
    SolverType,
    ancestral,
    check_choice,
    check_eta,
    eps_weights,
    euler_row,
    out_of_noise,
    sampler,
    takes_euler,
)
from fastdiff.diffusion.schedules import NoiseSchedule

Estimate = Literal["eps", "x0"]


@sampler("heun", order=2, evaluations=2, needs_signal=True)
def heun(
    levels: Sequence[Level],
    *,
    schedule: NoiseSchedule | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> list[Row]:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two rows per step.

    The first row takes an Euler step and keeps y + (sigma_ve' - sigma_ve) / 2 * d, the part of the
    result that is known by then. The second row adds the other half of the slope, evaluated at the
    end. As in the paper, the step to sigma = 0 is an Euler step; so is a step from nearly pure
    noise (`OUT_OF_NOISE`). With s_churn, noise is added before each step (algorithm 2, `Churn`).
    """
    churn = Churn(levels, schedule, s_churn, s_tmin, s_tmax, s_noise)
    rows = []
    for step, (now, to) in enumerate(zip(churn.raised, levels[1:], strict=True)):
        first = euler_row(now, to, step)
        if to.sigma == 0 or out_of_noise(now, to):
            rows.append(churn.then(first))
            continue
        p = (to.alpha / now.alpha + first.a) / 2
        q = to.alpha * (1 - to.ve_sigma / now.ve_sigma) / 2
        rows.append(Row(at=now, step=step, a=first.a, b=first.b, slot=0, p=p, q=q))
        half = (1 - now.ve_sigma / to.ve_sigma) / 2
        second = Row(at=to, step=step, a=half, b=-to.alpha * half, c=(1.0, 0.0, 0.0))
        rows.append(churn.then(second))
    return rows


@sampler("flow-heun", order=2, evaluations=2)
def flow_heun(levels: Sequence[Level]) -> list[Row]:
    """Heun's method along the paths of flow matching (Lipman et al. 2023; SD3, Esser et al. 2024).

    x_s' = x_s + (s' - s) * (F + F') / 2, with F = (x_s - D) / s = n_hat - D at both ends. The first
    row takes an Euler step and keeps F, the second adds (s' - s) * (F' - F) / 2. The step to s = 0
    is an Euler step. In variance-preserving terms s = sigma / (alpha + sigma), x_s = x / (alpha +
    sigma) and F = (x - (alpha + sigma) * D) / sigma. `heun` averages slopes over sigma / alpha.
    """
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        first = euler_row(now, to, step)
        if to.sigma == 0:
            rows.append(first)
            continue
        whole, end = now.alpha + now.sigma, to.alpha + to.sigma
        rows.append(replace(first, slot=0, p=1 / now.sigma, q=-whole / now.sigma))
        half = end * (to.sigma / end - now.sigma / whole) / 2
        a, b = 1 + half / to.sigma, -half * end / to.sigma
        rows.append(Row(at=to, step=step, a=a, b=b, c=(-half, 0.0, 0.0)))
    return rows


def solver_weights(
    points: Sequence[Level], to: Level, estimate: Estimate, solver_type: SolverType
) -> tuple[float, list[float]]:
    """(k, w) of a DPM-Solver step from points[0] to `to`: x' = k x + sum of w_i * O_i.

    O_i is the noise ("eps", DPM-Solver: Lu et al. 2022a, eq. 3.7) or the clean sample ("x0",
    DPM-Solver++: Lu et al. 2022b, eq. 9) that the network estimates at points[i]; x is at
    points[0]. The integral of its Taylor series in h, the step in log-SNR, has the weights

        g_0 = alpha' (1 - e^-h)                   -sigma' (e^h - 1)
        g_1 = alpha' ((e^-h - 1) / h + 1)         -sigma' ((e^h - 1) / h - 1)
        g_2 = alpha' (1/2 - (e^-h - 1 + h) / h²)  -sigma' ((e^h - 1 - h) / h² - 1/2)

    and its derivatives are differences of the O_i. solver_type names what the authors' code offers:
    "heun" takes these weights, "midpoint" g_0 / 2 in place of g_1 with two points and only the
    difference between the first and the last of three.
    """
    start = points[0]
    decay = to.ve_sigma / start.ve_sigma  # e^-h without infinities
    if estimate == "x0":
        keep, g0 = to.sigma / start.sigma, to.alpha * (1 - decay)
    else:
        keep, g0 = to.alpha / start.alpha, to.alpha * (to.ve_sigma - start.ve_sigma)
    if len(points) == 1:
        return keep, [g0]
    h = -math.log(decay)
    if estimate == "x0":
        g1, g2 = to.alpha - g0 / h, to.alpha * (0.5 - 1 / h) + g0 / h**2
    else:
        g1, g2 = to.sigma + g0 / h, to.sigma * (0.5 + 1 / h) + g0 / h**2
    r = [math.log(start.ve_sigma / point.ve_sigma) / h for point in points]
    if len(points) == 2:
        w = (g0 / 2 if solver_type == "midpoint" else g1) / r[1]
        return keep, [g0 - w, w]
    if solver_type == "midpoint":
        return keep, [g0 - g1 / r[2], 0.0, g1 / r[2]]
    # O' h = (r2 (O_1 - O_0) / r1 - r1 (O_2 - O_0) / r2) / (r2 - r1), O'' h² likewise
    d = r[2] - r[1]
    w1 = (g1 * r[2] - 2 * g2) / (r[1] * d)
    w2 = (2 * g2 - g1 * r[1]) / (r[2] * d)
    return keep, [g0 - w1 - w2, w1, w2]


def solver_rows(
    points: Sequence[Level],
    to: Level,
    step: int,
    estimate: Estimate,
    solver_types: tuple[SolverType, SolverType],
    *,
    s: float = 0.0,
) -> list[Row]:
    """The rows of a DPM-Solver step that evaluates the network at `points`, up to three.

    Each row goes from its point to the next by `solver_weights` of all evaluations so far, and
    keeps its own in a slot. The weights refer to x at the start of the step, X, which is not kept:
    with x = k X + sum of c_i O_i it is (x - sum of c_i O_i) / k.

    solver_types: with two and with three points. s: noise added at the end.
    """
    rows, keep, c = [], 1.0, list[float]()
    for number, (now, following) in enumerate(zip(points, [*points[1:], to], strict=True)):
        kind = solver_types[0] if number < 2 else solver_types[1]
        k, w = solver_weights(points[: number + 1], following, estimate, kind)
        p, q = (0.0, 1.0) if estimate == "x0" else eps_weights(now, 1.0)
        last, back = number == len(points) - 1, k / keep
        older = [new - back * old for new, old in zip(w, c, strict=False)] + [0.0] * 3
        rows.append(
            Row(
                at=now,
                step=step,
                a=back + w[-1] * p,
                b=w[-1] * q,
                c=(older[0], older[1], older[2]),
                s=s if last else 0.0,
                slot=-1 if last else number,
                p=0.0 if last else p,
                q=0.0 if last else q,
            )
        )
        keep, c = k, w
    return rows


def _between(
    schedule: NoiseSchedule | None, now: Level, to: Level, fractions: Sequence[float]
) -> list[Level]:
    """The levels at fractions of the step in log-SNR."""
    if schedule is None:
        raise ValueError(
            "this sampler evaluates the network between the levels, so it needs the noise schedule "
            "to find their timesteps; pass schedule="
        )
    logs = math.log(now.ve_sigma), math.log(to.ve_sigma)
    sigmas = [math.exp(logs[0] + part * (logs[1] - logs[0])) for part in fractions]
    return levels_of_sigmas(schedule, sigmas)


def _solved(
    levels: Sequence[Level],
    schedule: NoiseSchedule | None,
    fractions: Sequence[float],
    estimate: Estimate,
    eta: float = 0.0,
) -> list[Row]:
    """A DPM-Solver step from each level to the next, with evaluations at fractions of it."""
    check_eta(eta)
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        if takes_euler(now, to):
            rows.append(euler_row(now, to, step))
            continue
        down, s = ancestral(now, to, eta) if eta else (to, 0.0)
        points = [now, *_between(schedule, now, down, fractions)]
        rows += solver_rows(points, down, step, estimate, ("midpoint", "midpoint"), s=s)
    return rows


@sampler("dpm-solver-2", order=2, evaluations=2, needs_signal=True)
def dpm_solver_2(levels: Sequence[Level], *, schedule: NoiseSchedule | None = None) -> list[Row]:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1 with r1 = 1/2): the midpoint rule in log-SNR.

    x' = alpha' / alpha * x - sigma' * (e^h - 1) * eps_hat(midpoint), and an Euler step gives x at
    the midpoint. Steps to sigma = 0 and from nearly pure noise (`OUT_OF_NOISE`) are Euler steps.
    """
    return _solved(levels, schedule, (1 / 2,), "eps")


@sampler("dpm-solver-3", order=3, evaluations=3, needs_signal=True)
def dpm_solver_3(levels: Sequence[Level], *, schedule: NoiseSchedule | None = None) -> list[Row]:
    """DPM-Solver-3 (Lu et al. 2022a, algorithm 2): evaluations at 0, 1/3 and 2/3 of a step.

    Steps to sigma = 0 and from nearly pure noise (`OUT_OF_NOISE`) are Euler steps.
    """
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        if takes_euler(now, to):
            rows.append(euler_row(now, to, step))
            continue
        points = [now, *_between(schedule, now, to, (1 / 3, 2 / 3))]
        rows += solver_rows(points, to, step, "eps", ("heun", "midpoint"))
    return rows


@sampler("kdpm2", order=2, evaluations=2, needs_signal=True)
def kdpm2(levels: Sequence[Level], *, schedule: NoiseSchedule | None = None) -> list[Row]:
    """The midpoint rule in log sigma, as k-diffusion's dpm_2 and diffusers' KDPM2.

    y' = y + (sigma_ve' - sigma_ve) * d(midpoint) with y = x / alpha. Since sigma_ve - sigma_ve' is
    sigma' / alpha' * (e^h - 1), this is DPM-Solver-2's table.
    """
    return dpm_solver_2(levels, schedule=schedule)


@sampler("kdpm2-ancestral", order=2, evaluations=2, needs_signal=True)
def kdpm2_ancestral(
    levels: Sequence[Level], *, schedule: NoiseSchedule | None = None, eta: float = 1.0
) -> list[Row]:
    """The midpoint rule to sigma_down, then noise of sigma_up, as k-diffusion's dpm_2_ancestral.

    sigma_up and sigma_down are those of euler-ancestral; the midpoint is between sigma and
    sigma_down.
    """
    return _solved(levels, schedule, (1 / 2,), "eps", eta)


@sampler("dpmpp-2s", order=2, evaluations=2, needs_signal=True)
def dpmpp_2s(levels: Sequence[Level], *, schedule: NoiseSchedule | None = None) -> list[Row]:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1 with r = 1/2): the midpoint rule for x0.

    x' = sigma' / sigma * x + alpha' * (1 - e^-h) * D(midpoint).
    """
    return _solved(levels, schedule, (1 / 2,), "x0")


@sampler("dpmpp-2s-ancestral", order=2, evaluations=2, needs_signal=True)
def dpmpp_2s_ancestral(
    levels: Sequence[Level], *, schedule: NoiseSchedule | None = None, eta: float = 1.0
) -> list[Row]:
    """DPM-Solver++(2S) to sigma_down, then noise of sigma_up, as in k-diffusion.

    sigma_up and sigma_down are those of euler-ancestral; the midpoint is between sigma and
    sigma_down.
    """
    return _solved(levels, schedule, (1 / 2,), "x0", eta)


@sampler("dpmpp-sde", order=2, evaluations=2, needs_signal=True)
def dpmpp_sde(
    levels: Sequence[Level], *, schedule: NoiseSchedule | None = None, eta: float = 1.0
) -> list[Row]:
    """DPM-Solver++ with noise in both halves of a step, as k-diffusion's dpmpp_sde with r = 1/2.

    Both rows start from x: the first goes to the midpoint, the second with the midpoint's D to the
    end, each down to the sigma_down of its own end and up by sigma_up. They see one Brownian
    motion in sigma_ve: with n_1 the noise of the first row, the second has sqrt(w) n_1 +
    sqrt(1 - w) n_2, w = (sigma_ve - sigma_ve,mid) / (sigma_ve - sigma_ve'). n_1 is found in x at
    the midpoint, from which the kept combination takes the rest away.
    """
    check_eta(eta)
    rows = []
    for step, (now, to) in enumerate(pairwise(levels)):
        if takes_euler(now, to):
            rows.append(euler_row(now, to, step))
            continue
        (mid,) = _between(schedule, now, to, (1 / 2,))
        (mid_down, mid_up), (down, up) = ancestral(now, mid, eta), ancestral(now, to, eta)
        first = euler_row(now, mid_down, step)
        keep, (gain,) = solver_weights([now], down, "x0", "midpoint")
        w = (now.ve_sigma - mid.ve_sigma) / (now.ve_sigma - to.ve_sigma)
        shared = up * math.sqrt(w) / mid_up if eta else 0.0
        p, q = keep - shared * first.a, -shared * first.b
        rows.append(Row(at=now, step=step, a=first.a, b=first.b, s=mid_up, slot=0, p=p, q=q))
        s = up * math.sqrt(1 - w)
        rows.append(Row(at=mid, step=step, a=shared, b=gain, c=(1.0, 0.0, 0.0), s=s))
    return rows


@sampler("dpm-singlestep", order=2, needs_signal=True)
def dpm_singlestep(
    levels: Sequence[Level],
    *,
    solver_order: int = 2,
    estimate: Estimate = "x0",
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = True,
) -> list[Row]:
    """DPM-Solver and DPM-Solver++ singlestep on the steps' own grid (Lu et al. 2022a and 2022b).

    Groups of `solver_order` (1 to 3) steps of the spacing are one step of the solver, as in the
    authors' code, so each step is one evaluation. If the number is not a multiple, or with
    lower_order_final, the last groups are smaller; the step to sigma = 0 is always of order 1. The
    order of convergence is `solver_order`, and at most 2 if groups are smaller.

    estimate: "x0" is DPM-Solver++, "eps" DPM-Solver.
    """
    check_choice("solver_order", solver_order, (1, 2, 3))
    check_choice("estimate", estimate, ("x0", "eps"))
    check_choice("solver_type", solver_type, ("midpoint", "heun"))
    rows, start = [], 0
    final = levels[-1].sigma == 0
    for size in _groups(len(levels) - 1, solver_order, low=lower_order_final or final):
        parts = [size]
        if size > 1 and final and start + size == len(levels) - 1:
            parts = [size - 1, 1]
        for part in parts:
            points, to = levels[start : start + part], levels[start + part]
            made = solver_rows(points, to, 0, estimate, (solver_type, solver_type))
            rows += [replace(row, step=start + place) for place, row in enumerate(made)]
            start += part
    return rows


def _groups(steps: int, order: int, *, low: bool) -> list[int]:
    """How many steps each step of the solver takes, as in the authors' code."""
    if order == 1 or (not low and steps % order == 0):
        return [order] * (steps // order)
    rest = steps % order
    if rest:
        return [order] * (steps // order) + [rest]
    return [order] * (steps // order - 1) + [order - 1, 1]
