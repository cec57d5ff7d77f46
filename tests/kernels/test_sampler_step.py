"""sampler_step: each term of a row, compared with the same row written out in NumPy."""

from __future__ import annotations

import math
import sys
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fastdiff import kernels
from fastdiff.diffusion.samplers import SAMPLERS, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.kernels import COLUMNS, SAMPLER_NOISE, philox4x32, philox_normal, sampler_step
from fastdiff.kernels.sampler_step import cuda as step_on_cuda
from fastdiff.kernels.sampler_step import triton as step_on_triton
from fastdiff.kernels.triton import recording_launches
from fastdiff.kernels.tuning import configs
from tests.kernels import cases
from tests.kernels.cases import recording
from tests.kernels.graphs import captured, no_waiting
from tests.kernels.interpreter import counting_traffic
from tests.support.parity import assert_parity

C = COLUMNS
SEEDS = torch.tensor([7, 2**40 + 1, 0])


def make_table(*rows: dict[COLUMNS, float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    table = torch.zeros(len(rows), len(COLUMNS), dtype=dtype)
    table[:, C.CLAMP], table[:, C.SLOT], table[:, C.W] = math.inf, -1, 1
    table[:, C.NOISE_STEP] = torch.arange(len(rows))
    for i, row in enumerate(rows):
        for column, value in row.items():
            table[i, column] = value
    return table


def drawn(
    n: int = 3, c: int = 2, *, guided: bool, learned: bool, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n + 10 * c + 100 * seed)
    shape = (c, 4, 5)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    f = torch.randn(n * (1 + guided), c * (1 + learned), 4, 5, generator=generator).double()
    history = torch.randn(3, n, *shape, generator=generator, dtype=torch.float64)
    return x, f, history


def by_hand(
    x: np.ndarray, f: np.ndarray, h: np.ndarray, row: np.ndarray, noise: np.ndarray, rescale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The module docstring's equations, sample by sample; f: (n, ...) or [uncond; cond]."""
    n, c = x.shape[:2]
    r = {column: float(row[column]) for column in COLUMNS}
    out, history = x.copy(), h.copy()
    for i in range(n):
        cond = f[-n:][i]
        pred = cond[:c]
        if len(f) == 2 * n:
            uncond = f[i][:c]
            pred = uncond + r[C.W] * (cond[:c] - uncond)
            if rescale:
                rescaled = pred * (cond[:c].std() / pred.std())
                pred = rescale * rescaled + (1 - rescale) * pred
        d = np.clip(r[C.U] * x[i] + r[C.V] * pred, -r[C.CLAMP], r[C.CLAMP])
        factor = r[C.S]
        if cond.shape[0] == 2 * c and factor != 0:
            fraction = (cond[c:] + 1) / 2
            factor = np.exp(0.5 * (fraction * r[C.LOGVAR_MAX] + (1 - fraction) * r[C.LOGVAR_MIN]))
        out[i] = r[C.A] * x[i] + r[C.B] * d + factor * noise[i]
        for k, column in enumerate((C.C1, C.C2, C.C3)):
            out[i] += r[column] * h[k, i]
        if r[C.SLOT] >= 0:
            history[int(r[C.SLOT]), i] = r[C.P] * x[i] + r[C.Q] * d
    return out, history


FULL = {C.U: 1.3, C.V: -0.7, C.A: 0.9, C.B: 0.4, C.C1: 0.3, C.C2: -0.2, C.C3: 0.1}
STORE = {C.P: 0.6, C.Q: -1.1}
ROWS = {
    "ddim": {C.U: 1.3, C.V: -0.7, C.A: 0.9, C.B: 0.4},
    "ancestral": {C.U: 1.3, C.V: -0.7, C.A: 0.9, C.B: 0.4, C.S: 0.5},
    "multistep": {**FULL, **STORE, C.SLOT: 2},
    "overwrites the slot it reads": {**FULL, **STORE, C.SLOT: 0},
    "clamped": {**FULL, **STORE, C.SLOT: 1, C.CLAMP: 0.8, C.W: 2.5},
    "guided": {**FULL, C.W: 7.5, C.S: 0.2},
    "variance bounds": {**FULL, C.S: 1.0, C.LOGVAR_MIN: -3.0, C.LOGVAR_MAX: -0.5, C.W: 3.0},
    "no noise, so no variance": {**FULL, C.LOGVAR_MIN: -3.0, C.LOGVAR_MAX: -0.5},
}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("guided", "rescale"), [(False, 0.0), (True, 0.0), (True, 0.7)])
@pytest.mark.parametrize("name", ROWS)
def test_rows_by_hand(name: str, guided: bool, rescale: float, learned: bool) -> None:
    x, f, history = drawn(guided=guided, learned=learned)
    table = make_table({C.A: 5.0}, ROWS[name])
    noise = philox_normal(SEEDS, x.shape[1:], step=1, stream=SAMPLER_NOISE).double()
    arrays = (t.numpy().copy() for t in (x, f, history, table[1], noise))
    expected_x, expected_history = by_hand(*arrays, rescale)
    pointers = x.data_ptr(), history.data_ptr()
    table[:, C.RESCALE] = rescale
    with recording("sampler_step") as ran:
        rows = torch.ones(3, dtype=torch.int64)
        assert sampler_step(x, f, history, table, rows, SEEDS, **halves(x, f)) is None
    assert ran == ["reference"]
    assert (x.data_ptr(), history.data_ptr()) == pointers
    np.testing.assert_allclose(x.numpy(), expected_x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(history.numpy(), expected_history, rtol=1e-12, atol=1e-12)


def halves(x: torch.Tensor, f: torch.Tensor) -> dict[str, torch.Tensor]:
    """The indices cond and uncond for [uncond; cond], or nothing for an unguided prediction."""
    own = torch.arange(len(x), device=x.device)
    return {"cond": own + len(x), "uncond": own} if len(f) == 2 * len(x) and len(x) else {}


def stepped(
    backend: str,
    x: torch.Tensor,
    f: torch.Tensor,
    history: torch.Tensor,
    table: torch.Tensor,
    *,
    step: int = 0,
    rows: torch.Tensor | None = None,
    seeds: torch.Tensor = SEEDS,
    rescale: float = 0.0,
    promised: bool = False,
    **options: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and history after a step on one backend, computed on copies with the same strides.

    step: the row of all samples, if `rows` is not given. rescale: column RESCALE of all rows.
    promised: that no row rescales. options: of `sampler_step`, denoised, finite and log_prob are
    written; without cond those of `halves`.
    """
    device = cases.device_of(backend)
    if rows is None:
        rows = torch.full((len(x),), step)
    if rescale:
        table = table.clone()
        table[:, C.RESCALE] = rescale
    indices = {} if "cond" in options else halves(x, f)
    given = {name: t.to(device, copy=True) for name, t in {**indices, **options}.items()}
    x, history = x.to(device, copy=True), history.to(device, copy=True)
    with kernels.backend(backend), recording("sampler_step") as ran:
        rest = history, table.to(device), rows.to(device), seeds.to(device)
        sampler_step(x, f.to(device), *rest, **given, rescale=not promised)
    assert ran == [backend]
    for name in options.keys() & {"denoised", "finite", "log_prob"}:
        options[name].copy_(given[name])
    return x.cpu(), history.cpu()


def check_row(
    backend: str, row: dict[COLUMNS, float], f_dtype: torch.dtype, *, guided: bool, learned: bool
) -> None:
    """Compare an fp32 step with NumPy in fp64, with and without rescaling, by the parity rule."""
    table = make_table(row, dtype=torch.float32)

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        x, f, history = (t.float() for t in drawn(guided=guided, learned=learned, seed=seed))
        return x, f.to(f_dtype), history

    @cache
    def ours(rescale: float, seed: int) -> tuple[torch.Tensor, ...]:
        return stepped(backend, *inputs(seed), table, seeds=SEEDS + seed, rescale=rescale)

    @cache
    def numpys(dtype: torch.dtype, rescale: float, seed: int) -> tuple[torch.Tensor, ...]:
        x, f, history = inputs(seed)
        noise = philox_normal(SEEDS + seed, x.shape[1:], step=0, stream=SAMPLER_NOISE)
        arrays = (t.to(dtype).numpy().copy() for t in (x, f, history, table[0], noise))
        return tuple(map(torch.from_numpy, by_hand(*arrays, rescale)))

    for rescale in (0.0, 0.7) if guided else (0.0,):
        for index in (0, 1):
            assert_parity(
                lambda seed, r=rescale, i=index: ours(r, seed)[i],
                lambda seed, r=rescale, i=index: numpys(torch.float64, r, seed)[i],
                lambda seed, r=rescale, i=index: numpys(torch.float32, r, seed)[i],
            )


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_fp32_parity(name: str, guided: bool, learned: bool, backend: str) -> None:
    check_row(backend, ROWS[name], torch.float32, guided=guided, learned=learned)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_fp32_parity_at_drawn_rows(backend: str) -> None:
    def check(data: st.DataObject) -> None:
        guided, learned = data.draw(st.booleans()), data.draw(st.booleans())
        coefficient = st.floats(-3, 3, width=16)
        row = {column: data.draw(coefficient) for column in (*FULL, *STORE, C.S, C.W)}
        row |= {C.SLOT: data.draw(st.integers(-1, 2)), C.LOGVAR_MIN: -2.0, C.LOGVAR_MAX: 0.5}
        row[C.CLAMP] = data.draw(st.sampled_from([0.5, 1.0, math.inf]))
        f_dtype = data.draw(st.sampled_from(cases.DTYPES))
        check_row(backend, row, f_dtype, guided=guided, learned=learned)

    cases.check_draws(check, backend, 30)


LINEAR = NoiseSchedule(ScheduleConfig())


def network(x: torch.Tensor, *, learned: bool) -> torch.Tensor:
    """A smooth nonlinear function, with two different halves of channels if `learned`."""
    cond = torch.tanh(x) + 0.3 * torch.sin(3 * x)
    f = torch.cat([0.8 * cond - 0.1 * x, cond])
    return torch.cat([f, torch.cos(2 * f)], dim=1) if learned else f


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("name", [*SAMPLERS, "ddpm-learned", "clamped", "rescaled"])
def test_a_whole_trajectory_of_every_sampler(name: str, backend: str) -> None:
    """10 steps with guidance and noise: fp32 on each backend, in parity with fp64.

    All runs use the predictions of one fp32 run. If each run fed its own results to the network,
    chance would decide whether errors in the last place grow or shrink.
    """
    learned, rescale = name == "ddpm-learned", 0.7 if name == "rescaled" else 0.0
    sampler = {"ddpm-learned": "ddpm", "clamped": "ddpm", "rescaled": "dpmpp-2m-sde"}.get(
        name, name
    )
    options: dict = {"variance": "learned"} if learned else {}
    if sampler == "ddim":
        options["eta"] = 0.7
    clamp = 1.0 if name == "clamped" else None
    table = build_table(sampler, LINEAR, 10, clamp=clamp, guidance_scale=2.0, **options)
    predictions: dict[tuple[int, int], torch.Tensor] = {}

    def run(backend: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        x, columns = torch.randn(3, 2, 6, 5, generator=draw), table.columns.float().to(dtype)
        x = x.to(dtype)
        history = torch.full((3, *x.shape), math.nan, dtype=dtype)
        for row in range(len(table)):
            if (seed, row) not in predictions:
                assert dtype == torch.float32
                predictions[seed, row] = network(x, learned=learned)
            f = predictions[seed, row].to(dtype)
            x, history = stepped(backend, x, f, history, columns, step=row, rescale=rescale)
        return x

    @cache
    def eager(seed: int) -> torch.Tensor:
        return run("reference", torch.float32, seed)

    def exact(seed: int) -> torch.Tensor:
        eager(seed)  # computes the predictions
        y = run("reference", torch.float64, seed)
        assert y.isfinite().all()
        return y

    eager(0)
    assert_parity(lambda seed: run(backend, torch.float32, seed), exact, eager)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_a_slot_with_coefficient_zero_is_not_read(backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    history[:] = float("nan")
    x, history = stepped(backend, x, f, history, make_table(ROWS["ddim"], dtype=torch.float32))
    assert x.isfinite().all()
    assert history.isnan().all()


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_the_noise_is_keyed_by_seed_and_row(backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    table = make_table({C.S: 1.0}, {C.S: 1.0}, dtype=torch.float32)
    results = [
        stepped(backend, x, f, history, table, step=step, seeds=seeds)[0]
        for seeds, step in ((SEEDS, 0), (SEEDS, 1), (SEEDS.flip(0), 0))
    ]
    assert torch.equal(results[0], results[2].flip(0))
    assert (results[0] - results[1]).abs().mean() > 0.5


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    seeds = torch.arange(7)
    x, f, history = (t.float() for t in drawn(7, guided=True, learned=True))
    table = make_table(ROWS["variance bounds"], dtype=torch.float32)
    together, _ = stepped(backend, x, f, history, table, seeds=seeds, rescale=0.5)
    again, _ = stepped(backend, x, f, history, table, seeds=seeds, rescale=0.5)
    assert torch.equal(together, again)
    for i in range(0, 7, 3):
        one = slice(i, i + 1)
        own = x[one], f[[i, 7 + i]], history[:, one]
        alone, _ = stepped(backend, *own, table, seeds=seeds[one], rescale=0.5)
        assert torch.equal(alone[0], together[i])


MIX = {
    **ROWS,
    "rescaled": {**FULL, C.W: 4.0, C.RESCALE: 0.7},
    "idle": {},
}
"""Rows that share a batch; "idle" stands for a sample without a row."""


def mixed(generator: torch.Generator, *, learned: bool = True) -> dict[str, torch.Tensor]:
    """13 samples at different rows of a table, some idle, some unguided, that use the 20 parts of a
    prediction in any order."""
    n, c, m = 13, 2, 20
    names = [name for name in MIX if name != "idle"]
    table = make_table(*(MIX[name] for name in names), dtype=torch.float32)
    table[:, C.NOISE_STEP] = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 8][: len(names)])
    rows = torch.arange(n) % len(names)
    rows[[2, 11]] = -1
    cond, uncond = torch.arange(n) + 7, torch.arange(n) % 7
    uncond[[1, 4, 5]] = -1
    shape = (c, 9, 13)
    return {
        "x": torch.randn(n, *shape, generator=generator),
        "f": torch.randn(m, c * (1 + learned), 9, 13, generator=generator),
        "history": torch.randn(3, n, *shape, generator=generator),
        "table": table,
        "rows": rows,
        "seeds": torch.arange(n) + 2**40,
        "cond": cond,
        "uncond": uncond,
    }


def run_mixed(
    backend: str, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, history, denoised and finite; the last two start as 7 and True."""
    denoised = torch.full_like(batch["x"], 7.0)
    finite = torch.ones(len(batch["x"]), dtype=torch.bool)
    x, history = stepped(backend, **batch, denoised=denoised, finite=finite)
    return x, history, denoised, finite


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("learned", [False, True])
def test_every_sample_takes_its_own_row(learned: bool, backend: str) -> None:
    """Compare each sample, with its row, its parts of the prediction and D, with NumPy."""

    @cache
    def batch(seed: int) -> dict[str, torch.Tensor]:
        return mixed(torch.Generator().manual_seed(5 + seed), learned=learned)

    @cache
    def ours(seed: int) -> list[torch.Tensor]:
        x, history, denoised, finite = run_mixed(backend, batch(seed))
        assert finite.all()
        idle = batch(seed)["rows"] < 0
        assert idle.any()
        assert torch.equal(x[idle], batch(seed)["x"][idle])
        assert torch.equal(history[:, idle], batch(seed)["history"][:, idle])
        assert (denoised[idle] == 7).all()
        return [x[~idle], history[:, ~idle], denoised[~idle]]

    @cache
    def numpys(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
        found = samples_by_hand(batch(seed), dtype)
        return [torch.cat(parts, dim) for parts, dim in zip(found, (0, 1, 0), strict=True)]

    for index in range(3):
        assert_parity(
            lambda seed, i=index: ours(seed)[i],
            lambda seed, i=index: numpys(torch.float64, seed)[i],
            lambda seed, i=index: numpys(torch.float32, seed)[i],
        )


def samples_by_hand(
    batch: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """x, history and D of each sample of `mixed` that is not idle."""
    found: tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]] = [], [], []
    for i, row in enumerate(batch["rows"].tolist()):
        if row < 0:
            continue
        numbers = batch["table"][row]
        step = int(numbers[C.NOISE_STEP])
        seed = batch["seeds"][i : i + 1]
        noise = philox_normal(seed, batch["x"].shape[1:], step=step, stream=SAMPLER_NOISE)
        parts = [batch["uncond"][i], batch["cond"][i]]
        f = batch["f"][[int(part) for part in parts if part >= 0]]
        own = batch["x"][i : i + 1], f, batch["history"][:, i : i + 1], numbers, noise
        only_d = numbers.clone()
        only_d[[C.A, C.C1, C.C2, C.C3, C.S]], only_d[C.B], only_d[C.SLOT] = 0.0, 1.0, -1
        estimate = *own[:3], only_d, noise
        phi = float(numbers[C.RESCALE])
        results = (
            *by_hand(*(t.to(dtype).numpy().copy() for t in own), phi),
            by_hand(*(t.to(dtype).numpy().copy() for t in estimate), phi)[0],
        )
        for outputs, result in zip(found, results, strict=True):
            outputs.append(torch.from_numpy(result))
    return found


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_bits_do_not_depend_on_neighbours_places_or_the_stack(backend: str) -> None:
    """The bits of a sample stay the same if samples are shuffled, if others join the batch, and if
    its row and its parts of the prediction move."""
    generator = torch.Generator().manual_seed(11)
    batch = mixed(generator)
    expected = run_mixed(backend, batch)
    for size in (13, 13, 5, 1):
        chosen = torch.randperm(13, generator=generator)[:size]
        stack = torch.randperm(len(batch["table"]), generator=generator)
        parts = torch.randperm(len(batch["f"]), generator=generator)
        above, ahead = 3, 2  # rows and parts of other samples that come before ours
        other = torch.randn(above, len(C), generator=generator)
        rows = torch.where(batch["rows"] < 0, -1, stack.argsort()[batch["rows"]] + above)
        uncond = torch.where(batch["uncond"] < 0, -1, parts.argsort()[batch["uncond"]] + ahead)
        moved = {
            "x": batch["x"][chosen],
            "f": torch.cat([torch.full_like(batch["f"][:ahead], math.nan), batch["f"][parts]]),
            "history": batch["history"][:, chosen],
            "table": torch.cat([other, batch["table"][stack]]),
            "rows": rows[chosen],
            "seeds": batch["seeds"][chosen],
            "cond": parts.argsort()[batch["cond"]][chosen] + ahead,
            "uncond": uncond[chosen],
        }
        x, history, denoised, finite = run_mixed(backend, moved)
        assert torch.equal(x, expected[0][chosen])
        assert torch.equal(history, expected[1][:, chosen])
        assert torch.equal(denoised, expected[2][chosen])
        assert torch.equal(finite, expected[3][chosen])


def tall(seed: int, *, learned: bool) -> dict[str, torch.Tensor]:
    """Five samples of `mixed` at different rows, one idle, whose images are two tiles or parts."""
    batch = mixed(torch.Generator().manual_seed(50 + seed))
    chosen = torch.tensor([1, 2, 4, 6, 5])
    own = {name: batch[name][chosen] for name in ("rows", "seeds", "cond", "uncond")}
    draw = torch.Generator().manual_seed(60 + seed)
    x, history = (torch.randn(*n, 2, 19, 15, generator=draw) for n in ((5,), (3, 5)))
    f = torch.randn(20, 2 * (1 + learned), 19, 15, generator=draw)
    return {**own, "table": batch["table"], "x": x, "history": history, "f": f}


def log_prob_by_hand(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """(N,): the density of each sample's noise, 0 where its row has none, 7 where it is idle."""
    found = torch.full((len(batch["x"]),), 7.0, dtype=dtype)
    channels = batch["x"].shape[1]
    for i, index in enumerate(batch["rows"].tolist()):
        if index < 0:
            continue
        row = batch["table"][index].to(dtype)
        found[i] = 0
        if row[C.S] == 0:
            continue
        low, high = row[C.LOGVAR_MIN], row[C.LOGVAR_MAX]
        step, seed = int(row[C.NOISE_STEP]), batch["seeds"][i : i + 1]
        z = philox_normal(seed, batch["x"].shape[1:], step=step, stream=SAMPLER_NOISE)[0]
        fraction = (batch["f"][batch["cond"][i], channels:].to(dtype) + 1) / 2
        factor = torch.exp((fraction * high + (1 - fraction) * low) / 2)
        if not len(factor):
            factor = row[C.S].abs()
        normal = torch.distributions.Normal(torch.zeros((), dtype=dtype), factor)
        found[i] = normal.log_prob(factor * z.to(dtype)).sum()
    return found


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("learned", [False, True])
def test_the_log_density_of_the_noise(learned: bool, backend: str) -> None:
    """Against torch's normal density; x does not change, and no bit depends on the batch."""
    batch = partial(cache(tall), learned=learned)

    @cache
    def ours(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        density = torch.full((5,), 7.0)
        x, _ = stepped(backend, **batch(seed), log_prob=density)
        return x, density

    config = {"BLOCK": 128, "num_warps": 4}
    with configs.override_config("sampler_step", config):
        assert_parity(
            lambda seed: ours(seed)[1],
            lambda seed: log_prob_by_hand(batch(seed), torch.float64),
            lambda seed: log_prob_by_hand(batch(seed), torch.float32),
        )
        whole, (x, density) = batch(0), ours(0)
        noisy = (whole["table"][:, C.S] != 0)[whole["rows"]] & (whole["rows"] >= 0)
        assert density[~noisy].sort().values.tolist() == [0.0, 7.0]
        assert torch.equal(x, stepped(backend, **whole)[0])
        last = {name: t[-2:] for name, t in whole.items() if name not in ("f", "table", "history")}
        alone = torch.zeros(2)
        rest = {"f": whole["f"], "table": whole["table"], "history": whole["history"][:, -2:]}
        stepped(backend, **last, **rest, log_prob=alone)
        assert torch.equal(alone, density[-2:])


FAULTS = {
    "noise of the place in the batch": lambda seeds, step: (seeds + torch.arange(len(seeds)), step),
    "noise of the neighbours": lambda seeds, step: (seeds + seeds.sum(), step),
    "one step for all": lambda seeds, step: (seeds, step[:1].expand(len(seeds))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_test_of_bits_sees_a_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[sampler_step.__module__]
    whole = module.philox_normal_reference

    def wrong(seeds: torch.Tensor, *args: object, step: torch.Tensor, **kw: object) -> torch.Tensor:
        seeds, step = FAULTS[fault](seeds, step)
        return whole(seeds, *args, step=step, **kw)

    test_bits_do_not_depend_on_neighbours_places_or_the_stack("reference")
    monkeypatch.setattr(module, "philox_normal_reference", wrong)
    with pytest.raises(AssertionError):
        test_bits_do_not_depend_on_neighbours_places_or_the_stack("reference")


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize(
    ("value", "dtype"),
    list(zip([math.nan, math.inf, -math.inf], cases.DTYPES, strict=True)),
    ids=str,
)
def test_finite_is_cleared_for_the_samples_concerned(
    value: float, dtype: torch.dtype, backend: str
) -> None:
    """Only by values that a sample uses: its cond, its uncond, its variance in a row with noise.

    Each value in one dtype: all are widened to fp32 first.
    """
    batch = mixed(torch.Generator().manual_seed(3))
    batch["f"] = batch["f"].to(dtype)
    noisy = (batch["table"][:, C.S] != 0)[batch["rows"]] & (batch["rows"] >= 0)
    guided = (batch["uncond"] >= 0) & (batch["rows"] >= 0)
    for part, channel in ((7, 0), (12, 1), (2, 1), (9, 0), (8, 3), (7 + 6, 2), (19, 2), (0, 3)):
        spoiled = {**batch, "f": batch["f"].clone()}
        spoiled["f"][part, channel, 8, 12] = value  # the last element of the image
        is_cond = (batch["cond"] == part) & (batch["rows"] >= 0)
        hit = is_cond & noisy if channel >= 2 else is_cond | (guided & (batch["uncond"] == part))
        *_, finite = run_mixed(backend, spoiled)
        assert torch.equal(finite, ~hit), (part, channel)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_a_clamp_keeps_nan(backend: str) -> None:
    """A prediction that failed must not look like a pixel at the bound."""
    x, f, history = (t.float() for t in drawn(guided=True, learned=False))
    table = make_table(ROWS["clamped"], dtype=torch.float32)
    denoised = torch.zeros_like(x)
    f[-2, 1, 2, 3] = math.nan  # the conditional half of the second sample
    out, _ = stepped(backend, x, f, history, table, denoised=denoised)
    for result in (out, denoised):
        assert result.isnan().nonzero().tolist() == [[1, 1, 2, 3]]
    assert denoised.nan_to_num().abs().max() == 0.8


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_finite_is_never_set(backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    finite = torch.tensor([True, False, True])
    table = make_table(ROWS["ddim"], dtype=torch.float32)
    stepped(backend, x, f, history, table, finite=finite)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("name", ["ancestral", "variance bounds"])
def test_all_64_bits_of_a_seed_count(name: str, backend: str) -> None:
    """5 and 5 + 2^32 differ, and a seed of 2^63 or more is its int64 bit pattern."""
    seeds = [5, 5 + 2**32, 5 - 2**63, -1, 2**63 - 1]
    x = torch.ones(len(seeds), 2, 4, 5)
    f, history = torch.zeros(len(seeds), 4, 4, 5), torch.zeros(3, *x.shape)
    row = {**ROWS[name], C.A: 0.0, C.B: 0.0, C.C1: 0.0, C.C2: 0.0, C.C3: 0.0}
    table = make_table(row, dtype=torch.float32)
    f = f if name == "variance bounds" else f[:, :2]
    out, _ = stepped(backend, x, f, history, table, seeds=torch.tensor(seeds))
    for i, seed in enumerate(seeds):
        words = torch.tensor([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
        counter = torch.tensor([[block, 0, 0, SAMPLER_NOISE] for block in range(10)])
        u = ((philox4x32(counter, words) >> 9).double() + 0.5) / 2**23
        r, angle = (-2 * u[:, ::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
        z = torch.stack([r * angle.cos(), r * angle.sin()], dim=-1).reshape(2, 4, 5)
        factor = math.exp(-0.5 * 1.75) if name == "variance bounds" else 0.5
        torch.testing.assert_close(out[i].double(), factor * z, rtol=1e-5, atol=1e-5)
        assert not any(torch.equal(out[i], out[j]) for j in range(i))


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_views_are_written_through(backend: str) -> None:
    """x stored as (H, W, C, N), and x as a slice with gaps between rows."""
    device = cases.device_of(backend)
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    table = make_table(ROWS["multistep"], dtype=torch.float32)
    expected, slots = stepped(backend, x, f, history, table)
    stored = x.permute(2, 3, 1, 0).contiguous().to(device)
    wide, wider = torch.zeros(3, 2, 4, 8, device=device), torch.zeros(3, 3, 2, 4, 8, device=device)
    wide[..., 2:7], wider[..., 2:7] = x.to(device), history.to(device)
    rest = (t.to(device) for t in (table, torch.zeros(3, dtype=torch.int64), SEEDS))
    rest = tuple(rest)
    with kernels.backend(backend):
        sampler_step(stored.permute(3, 2, 0, 1), f.to(device), history.to(device), *rest)
        sampler_step(wide[..., 2:7], f.to(device), wider[..., 2:7], *rest)
    assert torch.equal(stored.permute(3, 2, 0, 1).cpu(), expected)
    assert torch.equal(wide[..., 2:7].cpu(), expected)
    assert torch.equal(wider[..., 2:7].cpu(), slots)
    assert wide.count_nonzero() == expected.numel()
    assert wider.count_nonzero() == slots.numel()


LAYOUTS = {
    "channels_last": cases.channels_last,
    "W and H swapped": lambda t: t.mT.contiguous().mT,
    "gaps between rows": lambda t: torch.cat([t, t], dim=3)[..., : t.shape[3]],
    "gaps between channels": lambda t: torch.cat([t, t], dim=2)[:, :, : t.shape[2]],
}


@pytest.mark.parametrize("backend", cases.KERNELS)
@pytest.mark.parametrize("which", ["prediction", "x", "all"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_give_the_same_bits_in_any_layout(name: str, which: str, backend: str) -> None:
    """Element e of the noise counts in logical order, not in memory order."""
    shape = 3, 3, 5, 7
    layout, dense = LAYOUTS[name], lambda t: t
    x, history = torch.randn(shape), torch.randn(3, *shape)
    f = torch.randn(6, 6, 5, 7).bfloat16()
    table = make_table({**ROWS["variance bounds"], **STORE, C.SLOT: 1}, dtype=torch.float32)
    expected = stepped(backend, x, f, history, table)
    of_x, of_f = (layout if which in (it, "all") else dense for it in ("x", "prediction"))
    slots = torch.stack([of_x(slot) for slot in history])
    if name == "channels_last" and which != "prediction":
        slots = history.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        slots = slots.unflatten(0, (3, 3))
    results = stepped(backend, of_x(x), of_f(f), slots, table)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


@pytest.mark.parametrize("backend", cases.KERNELS)
def test_gaps_between_channels_are_not_written(backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    table = make_table(ROWS["multistep"], dtype=torch.float32)
    expected, _ = stepped(backend, x, f, history, table)
    device = cases.device_of(backend)
    wide = torch.zeros(3, 2, 6, 5, device=device)
    wide[:, :, :4] = x.to(device)
    rows = torch.zeros(3, dtype=torch.int64)
    rest = (t.to(device) for t in (f, history, table, rows, SEEDS))
    with kernels.backend(backend):
        sampler_step(wide[:, :, :4], *rest)
    assert torch.equal(wide[:, :, :4].cpu(), expected)
    assert not wide[:, :, 4:].any()


@pytest.mark.parametrize("backend", cases.KERNELS)
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 9), (3, 2, 2, 3, 4), (3, 1, 1, 1)], ids=str)
def test_kernels_take_any_number_of_dimensions(shape: tuple[int, ...], backend: str) -> None:
    x, f, history = torch.randn(shape), torch.randn(6, *shape[1:]), torch.randn(3, *shape)
    table = make_table({**ROWS["guided"], **STORE, C.SLOT: 1}, dtype=torch.float32)
    for result, expected in zip(
        stepped(backend, x, f, history, table),
        stepped("reference", x, f, history, table),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", cases.KERNELS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_kernels_merge_the_moments_of_many_tiles(layout: str, learned: bool, backend: str) -> None:
    """The mean is far from 0, so that a single pass over squares would lose digits, and each part
    has several tiles. The channels of a learned variance, which lie between the others in
    channels_last, do not count."""
    shape = (2, 4, 20, 27)  # 9 tiles of 256
    x, history = torch.zeros(shape), torch.zeros(3, *shape)
    table = make_table({C.V: 1.0, C.B: 1.0, C.W: 3.0}, dtype=torch.float32)

    def run(backend: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
        numbers = torch.randn(4, 4, 20, 27, generator=torch.Generator().manual_seed(seed))
        f = 300 + numbers * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None, None, None]
        f = torch.cat([f, 50 * f], dim=1) if learned else f
        f = cases.channels_last(f) if layout == "channels_last" else f
        inputs = (t.to(dtype) for t in (x, f, history, table))
        return stepped(backend, *inputs, seeds=SEEDS[:2], rescale=0.9)[0]

    config = {"BLOCK": 32, "num_warps": 4}
    with pytest.MonkeyPatch.context() as patch, configs.override_config("sampler_step", config):
        patch.setattr(step_on_triton, "PARTS", 3)
        patch.setattr(step_on_cuda, "PARTS", 2)  # tiles of 1024
        assert_parity(
            partial(run, backend, torch.float32),
            partial(run, "reference", torch.float64),
            partial(run, "reference", torch.float32),
        )


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_half_precision_predictions_and_empty_batches(backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    table = make_table(ROWS["ddim"], dtype=torch.float32)
    half, _ = stepped(backend, x, f.bfloat16(), history, table)
    assert torch.equal(half, stepped(backend, x, f.bfloat16().float(), history, table)[0])
    stepped(backend, x[:0], f[:0], history[:, :0], table, seeds=SEEDS[:0])


OUT_OF_RANGE = {"rows": (-2, 1, 2**40), "cond": (-1, 6, 2**40), "uncond": (-2, 6, 2**40)}


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("which", OUT_OF_RANGE)
def test_rows_and_indices_out_of_range(which: str, backend: str) -> None:
    """They raise if the host reads them; on a GPU, only that sample becomes NaN. Indices of an idle
    sample are not checked."""
    x, f, history = (t.float() for t in drawn(guided=True, learned=True))
    table = make_table(ROWS["multistep"], dtype=torch.float32)
    for wrong in OUT_OF_RANGE[which]:
        indices = {"rows": torch.zeros(3, dtype=torch.int64), **halves(x, f)}
        good = stepped(backend, x, f, history, table, **indices)
        indices[which] = indices[which].clone()
        indices[which][1] = wrong
        finite, denoised = torch.ones(3, dtype=torch.bool), torch.zeros_like(x)
        if backend in ("reference", "cpu"):
            message = rf"{which} must be in \[(0|-1), [16]\), got {wrong} for sample 1"
            with pytest.raises(ValueError, match=message):
                stepped(backend, x, f, history, table, **indices)
        else:
            density = torch.zeros(3)
            outputs = {"finite": finite, "denoised": denoised, "log_prob": density}
            out, slots = stepped(backend, x, f, history, table, **indices, **outputs)
            assert density.isnan().tolist() == [False, True, False]
            assert out[1].isnan().all()
            assert denoised[1].isnan().all()
            assert finite.tolist() == [True, False, True]
            assert torch.equal(slots[:, 1], history[:, 1])
            assert torch.equal(out[::2], good[0][::2])
            assert torch.equal(slots[:, ::2], good[1][:, ::2])
        if which != "rows":
            indices["rows"][1] = -1
            out, _ = stepped(backend, x, f, history, table, **indices)
            assert torch.equal(out[1], x[1])
            assert torch.equal(out[::2], good[0][::2])


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_a_row_that_rescales_against_the_promise(backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=True, learned=False))
    table = make_table(ROWS["guided"], {**ROWS["guided"], C.RESCALE: 0.7}, dtype=torch.float32)
    rows = torch.tensor([0, 1, 0])
    good, _ = stepped(backend, x, f, history, table, rows=rows)
    if backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=r"RESCALE 0\.7, but .*; omit rescale=False"):
            stepped(backend, x, f, history, table, rows=rows, promised=True)
    else:
        out, _ = stepped(backend, x, f, history, table, rows=rows, promised=True)
        assert out[1].isnan().all()
        assert torch.equal(out[::2], good[::2])
    alone = {"cond": torch.arange(3), "uncond": torch.tensor([0, -1, 1])}
    out, _ = stepped(backend, x, f, history, table, rows=rows, promised=True, **alone)
    assert out.isfinite().all()  # unguided, so RESCALE has no effect


@cases.needs_triton
def test_how_many_kernels_triton_launches() -> None:
    x, f = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(4, 4, 8, 8, device="meta")
    history, table = torch.empty(3, 2, 4, 8, 8, device="meta"), torch.empty(5, 20, device="meta")
    index = torch.empty(2, dtype=torch.int64, device="meta")
    step, both = ["_sampler_step_kernel"], ["_moments_kernel", "_sampler_step_kernel"]
    added = [*both, "_log_prob_kernel"]
    density = torch.empty(2, device="meta")
    for pair, log_prob, rescale, names in (
        ((index, index), None, True, both),
        ((index, index), None, False, step),
        ((index, None), None, True, step),
        ((None, None), None, True, step),
        ((index, index), density, True, added),
    ):
        with recording_launches("sm_90") as launches:
            outputs = None, None, log_prob
            step_on_triton.forward(x, f, history, table, index, index, *pair, *outputs, rescale)
        assert [launch.kernel.__name__ for launch in launches] == names


@cases.needs_triton
def test_triton_objections() -> None:
    x, f, history = drawn(guided=False, learned=False)
    table, rows = make_table(ROWS["ddim"]), torch.zeros(3, dtype=torch.int64)
    objection = kernels.OPS["sampler_step"].backends["triton"].why_not
    options = None, None, None, None, None, True
    assert "got float64" in objection(x, f, history, table, rows, SEEDS, *options)
    wide = x.float(), f.float(), history.float(), table.float()
    moved = objection(*wide, rows.to("meta"), SEEDS, *options)
    assert "rows must be on the device of x" in moved
    moved = objection(*wide, rows, SEEDS, None, rows.to("meta"), *options[2:])
    assert "uncond must be on the device of x" in moved


@pytest.mark.slow
@cases.needs_triton
def test_triton_op_is_registered_right_and_compiles_without_break() -> None:
    device = cases.device_of("triton")
    table = make_table(ROWS["multistep"], ROWS["guided"], dtype=torch.float32).to(device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(sampler_step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 7, 9):  # a size equal to that of another dimension would add a graph
        x, f, history = (t.float().to(device) for t in drawn(n, guided=True, learned=False))
        rest = (
            table,
            torch.ones(n, dtype=torch.int64, device=device),
            torch.arange(n, device=device),
        )
        pair, outputs = halves(x, f), [torch.ones(n, dtype=torch.bool, device=device)]
        if n == 6:
            options = *pair.values(), torch.empty_like(x), *outputs, torch.empty(n), True
            cases.check_registration("sampler_step", "triton", x, f, history, *rest, *options)
            cases.check_registration(
                "sampler_step", "triton", x, f, history, *rest, None, None, None, None, None, True
            )
        mine, slots, flags = x.clone(), history.clone(), outputs[0].clone()
        estimates = [torch.empty_like(x), torch.empty_like(x)]
        with kernels.backend("triton"):
            compiled(mine, f, slots, *rest, **pair, denoised=estimates[0], finite=flags)
            sampler_step(x, f, history, *rest, **pair, denoised=estimates[1], finite=outputs[0])
        for have, want in ((mine, x), (slots, history), estimates, (flags, outputs[0])):
            assert torch.equal(have, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@cases.needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("name", "slots"),
    [("ddim", 0), ("ancestral", 0), ("multistep", 4), ("overwrites the slot it reads", 4)],
)
def test_traffic_is_what_the_docstring_says(
    name: str, slots: int, guided: bool, dtype: torch.dtype
) -> None:
    """`slots` counts the history slots that are read or written."""
    x, history = torch.randn(2, 4, 16, 16), torch.randn(3, 2, 4, 16, 16)
    f = torch.randn(2 * (1 + guided), 8, 16, 16).to(dtype)
    table = make_table(ROWS[name], dtype=torch.float32)
    learned = name == "ancestral"  # the variance is read only for the noise
    once, prediction = x.numel() * 4, x.numel() * f.itemsize
    with counting_traffic() as traffic:
        stepped("triton", x, f, history, table, seeds=SEEDS[:2])
    expected = (2 + slots) * once + (1 + guided + learned) * prediction
    assert traffic.total == pytest.approx(expected, rel=0.05)
    if guided:
        with counting_traffic() as traffic:
            stepped("triton", x, f, history, table, seeds=SEEDS[:2], rescale=0.5)
        assert traffic.total == pytest.approx(expected + 2 * prediction, rel=0.05)
    with counting_traffic() as traffic:
        flags, d = torch.ones(2, dtype=torch.bool), torch.zeros_like(x)
        stepped("triton", x, f, history, table, seeds=SEEDS[:2], denoised=d, finite=flags)
    assert traffic.total == pytest.approx(expected + once, rel=0.05)
    with counting_traffic() as traffic:
        stepped("triton", x, f, history, table, seeds=SEEDS[:2], step=-1, denoised=d)
    assert traffic.total < 0.01 * expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_captured_step_replays_with_other_rows_seeds_and_table(
    rescale: float, backend: str
) -> None:
    """Neither the launch nor the replay waits for the device."""
    if kernels.available()["sampler_step"][backend] is not None:
        pytest.skip(f"no {backend} kernels here")
    x, f, history = (t.float().cuda() for t in drawn(guided=True, learned=False))
    table = make_table(ROWS["guided"], ROWS["multistep"], dtype=torch.float32).cuda()
    table[:, C.RESCALE] = rescale
    rows, seeds = torch.zeros(3, dtype=torch.int64, device="cuda"), SEEDS.cuda()
    start, slots, pair = x.clone(), history.clone(), halves(x, f)

    def step() -> None:
        sampler_step(x, f, history, table, rows, seeds, **pair)

    with kernels.backend(backend):
        graph, _ = captured(step)
        with no_waiting():
            step()
        for row, shift, factor in (([0] * 3, 0, 1.0), ([1, 0, -1], 5, 1.0), ([1] * 3, 5, 0.5)):
            x.copy_(start), history.copy_(slots)
            rows.copy_(torch.tensor(row)), seeds.add_(shift), table[:, C.A].mul_(factor)
            graph.replay()
            have, kept = x.clone(), history.clone()
            x.copy_(start), history.copy_(slots)
            step()
            assert torch.equal(have, x)
            assert torch.equal(kept, history)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prediction": torch.zeros(3, 3, 4, 5)},
            r"prediction must have shape \(M, 2, 4, 5\) or \(M, 4, 4, 5\), got \(3, 3, 4, 5\)",
        ),
        ({"prediction": torch.zeros(6, 2, 4, 5)}, "without cond, .* of the 3 .* got 6; pass cond"),
        ({"history": torch.zeros(2, 3, 2, 4, 5)}, r"history must have shape \(3, 3, 2, 4, 5\)"),
        ({"history": torch.zeros(3, 3, 2, 4, 5).half()}, "history must have the dtype of x"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, r"seeds must have shape \(3,\)"),
        ({"seeds": torch.zeros(3)}, "seeds must be int64, got torch.float32"),
        ({"rows": torch.tensor(0)}, r"rows must have shape \(3,\), got \(\)"),
        ({"rows": torch.zeros(3).int()}, "rows must be int64, got torch.int32"),
        ({"cond": torch.zeros(2, dtype=torch.int64)}, r"cond must have shape \(3,\), got \(2,\)"),
        ({"uncond": torch.zeros(3)}, "uncond must be int64, got torch.float32"),
        ({"table": torch.zeros(1, 16)}, r"table must be \(rows, 20\), got \(1, 16\)"),
        ({"table": torch.zeros(1, 20).double()}, "table must have the dtype of x"),
        ({"denoised": torch.zeros(3, 2, 4)}, r"denoised must have shape \(3, 2, 4, 5\)"),
        ({"denoised": torch.zeros(3, 2, 4, 5).half()}, "denoised must have the dtype of x"),
        ({"finite": torch.ones(2, dtype=torch.bool)}, r"finite must have shape \(3,\), got \(2,\)"),
        ({"finite": torch.ones(3)}, "finite must be bool, got torch.float32"),
        ({"log_prob": torch.ones(3).double()}, "log_prob must be float32, got torch.float64"),
        ({"log_prob": torch.ones(2)}, r"log_prob must have shape \(3,\), got \(2,\)"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    arguments = {
        "prediction": f,
        "history": history,
        "table": make_table({}, dtype=torch.float32),
        "rows": torch.zeros(3, dtype=torch.int64),
        "seeds": SEEDS,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sampler_step(x, **arguments)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (1,), (3, 7, 11)])
@pytest.mark.parametrize("value", [1.0, 0.1, 0.3, 0.7, 1 / 3])
def test_rescaling_a_constant_prediction_leaves_it_alone(
    value: float, shape: tuple[int, ...], backend: str
) -> None:
    """A newly initialized model predicts 0 everywhere, so std is 0 and the formula has 0 / 0."""
    x, history = torch.ones(2, *shape), torch.zeros(3, 2, *shape)
    f = torch.cat([torch.full_like(x, value), torch.full_like(x, 3 * value)])
    table = make_table({C.V: 1.0, C.B: 1.0, C.W: 2.0}, dtype=torch.float32)
    plain, _ = stepped(backend, x, f, history, table, seeds=SEEDS[:2])
    x, _ = stepped(backend, x, f, history, table, seeds=SEEDS[:2], rescale=0.7)
    torch.testing.assert_close(x, torch.full_like(x, 5 * value))
    torch.testing.assert_close(x, plain, rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_guided_half_precision_predictions_are_combined_in_fp32(backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=True, learned=False))
    table = make_table(ROWS["guided"], dtype=torch.float32)
    half, _ = stepped(backend, x, f.bfloat16(), history, table)
    assert torch.equal(half, stepped(backend, x, f.bfloat16().float(), history, table)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x_is_kept_in_single_precision(dtype: torch.dtype) -> None:
    x, f, history = (t.to(dtype) for t in drawn(guided=False, learned=False))
    with pytest.raises(ValueError, match=r"fp32, got torch\.\w+ of .*keep x in fp32"):
        sampler_step(x, f, history, make_table({}, dtype=dtype), SEEDS, SEEDS)
