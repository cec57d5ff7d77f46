"""sampler_step: each term of a row, against the same row written out in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels import COLUMNS, SAMPLER_NOISE, philox_normal, sampler_step
from tests.kernels.cases import recording
from tests.parity import assert_parity

C = COLUMNS
SEEDS = torch.tensor([7, 2**40 + 1, 0])


def make_table(*rows: dict[COLUMNS, float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    table = torch.zeros(len(rows), len(COLUMNS), dtype=dtype)
    table[:, C.CLAMP], table[:, C.SLOT], table[:, C.W] = math.inf, -1, 1
    for i, row in enumerate(rows):
        for column, value in row.items():
            table[i, column] = value
    return table


def drawn(n: int = 3, c: int = 2, *, guided: bool, learned: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n + 10 * c)
    shape = (c, 4, 5)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    f = torch.randn(n * (1 + guided), c * (1 + learned), 4, 5, generator=generator).double()
    history = torch.randn(3, n, *shape, generator=generator, dtype=torch.float64)
    return x, f, history


def by_hand(
    x: np.ndarray, f: np.ndarray, h: np.ndarray, row: np.ndarray, noise: np.ndarray, rescale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The module docstring's equations, sample by sample."""
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
    with recording("sampler_step") as ran:
        assert (
            sampler_step(x, f, history, table, torch.tensor(1), SEEDS, guidance_rescale=rescale)
            is None
        )
    assert ran == ["reference"]
    assert (x.data_ptr(), history.data_ptr()) == pointers
    np.testing.assert_allclose(x.numpy(), expected_x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(history.numpy(), expected_history, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_fp32_parity_at_drawn_rows(data: st.DataObject) -> None:
    guided, learned = data.draw(st.booleans()), data.draw(st.booleans())
    coefficient = st.floats(-3, 3, width=16)
    row = {column: data.draw(coefficient) for column in (*FULL, *STORE, C.S, C.W)}
    row |= {C.SLOT: data.draw(st.integers(-1, 2)), C.LOGVAR_MIN: -2.0, C.LOGVAR_MAX: 0.5}
    row[C.CLAMP] = data.draw(st.sampled_from([0.5, 1.0, math.inf]))
    exact = [t.float().double() for t in drawn(guided=guided, learned=learned)]
    single = [t.float() for t in exact]
    table = make_table(row)
    eager = by_hand(
        *(t.numpy().copy() for t in single),
        table[0].float().numpy(),
        philox_normal(SEEDS, exact[0].shape[1:], step=0, stream=SAMPLER_NOISE).numpy(),
        0.0,
    )
    for (x, f, history), t in ((exact, table), (single, table.float())):
        sampler_step(x, f, history, t, torch.tensor(0), SEEDS)
    for i, index in ((0, 0), (2, 1)):
        assert_parity(single[i], exact[i], torch.from_numpy(eager[index]))


def test_a_slot_with_coefficient_zero_is_not_read() -> None:
    x, f, history = drawn(guided=False, learned=False)
    history[:] = float("nan")
    sampler_step(x, f, history, make_table(ROWS["ddim"]), torch.tensor(0), SEEDS)
    assert x.isfinite().all()


def test_the_noise_is_keyed_by_seed_and_row() -> None:
    x, f, history = drawn(guided=False, learned=False)
    table = make_table({C.S: 1.0}, {C.S: 1.0})
    results = []
    for seeds, step in ((SEEDS, 0), (SEEDS, 1), (SEEDS.flip(0), 0)):
        out = x.clone()
        sampler_step(out, f, history, table, torch.tensor(step), seeds)
        results.append(out)
    assert torch.equal(results[0], results[2].flip(0))
    assert (results[0] - results[1]).abs().mean() > 0.5


def test_a_sample_does_not_depend_on_its_batch() -> None:
    seeds = torch.arange(7)
    x, f, history = (t.float() for t in drawn(7, guided=True, learned=True))
    table = make_table(ROWS["variance bounds"], dtype=torch.float32)
    together, slots = x.clone(), history.clone()
    sampler_step(together, f, slots, table, torch.tensor(0), seeds, guidance_rescale=0.5)
    for i in range(7):
        alone, pair = x[i : i + 1].clone(), f[[i, 7 + i]]
        sampler_step(
            alone,
            pair,
            history[:, i : i + 1].clone(),
            table,
            torch.tensor(0),
            seeds[i : i + 1],
            guidance_rescale=0.5,
        )
        assert torch.equal(alone[0], together[i])


def test_views_are_written_through() -> None:
    x, f, history = drawn(guided=False, learned=False)
    expected = x.clone()
    sampler_step(expected, f, history.clone(), make_table(ROWS["ddim"]), torch.tensor(0), SEEDS)
    stored = x.permute(2, 3, 1, 0).contiguous()
    view = stored.permute(3, 2, 0, 1)
    sampler_step(view, f, history, make_table(ROWS["ddim"]), torch.tensor(0), SEEDS)
    assert torch.equal(stored.permute(3, 2, 0, 1), expected)


def test_half_precision_predictions_and_empty_batches() -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    other = x.clone()
    table = make_table(ROWS["ddim"], dtype=torch.float32)
    sampler_step(x, f.bfloat16(), history, table, torch.tensor(0), SEEDS)
    sampler_step(other, f.bfloat16().float(), history, table, torch.tensor(0), SEEDS)
    assert torch.equal(x, other)
    sampler_step(x[:0], f[:0], history[:, :0], table, torch.tensor(0), SEEDS[:0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(3, 3, 4, 5)}, r"prediction must have shape \(3, 2, 4, 5\) or"),
        ({"history": torch.zeros(2, 3, 2, 4, 5)}, r"history must have shape \(3, 3, 2, 4, 5\)"),
        ({"history": torch.zeros(3, 3, 2, 4, 5).half()}, "history must have the dtype of x"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, r"seeds must have shape \(3,\)"),
        ({"seeds": torch.zeros(3)}, "seeds must be int64, got torch.float32"),
        ({"step": torch.tensor([0])}, r"step must have shape \(\), got \(1,\)"),
        ({"step": torch.tensor(1)}, r"step must be in \[0, 1\), got 1"),
        ({"step": torch.tensor(-1)}, r"step must be in \[0, 1\), got -1"),
        ({"table": torch.zeros(1, 15)}, r"table must be \(rows, 16\), got \(1, 15\)"),
        ({"table": torch.zeros(1, 16).double()}, "table must have the dtype of x"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    arguments = {
        "prediction": f,
        "history": history,
        "table": make_table({}, dtype=torch.float32),
        "step": torch.tensor(0),
        "seeds": SEEDS,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sampler_step(x, **arguments)


@pytest.mark.parametrize("shape", [(2, 3), (1,)])
def test_rescaling_a_constant_prediction_leaves_it_alone(shape: tuple[int, ...]) -> None:
    """A new model predicts 0 everywhere: std 0, and 0 / 0 in the formula."""
    x, history = torch.ones(2, *shape), torch.zeros(3, 2, *shape)
    f = torch.cat([torch.full_like(x, 1.0), torch.full_like(x, 3.0)])
    table = make_table({C.V: 1.0, C.B: 1.0, C.W: 2.0}, dtype=torch.float32)
    sampler_step(x, f, history, table, torch.tensor(0), SEEDS[:2], guidance_rescale=0.7)
    assert torch.equal(x, torch.full_like(x, 5.0))


def test_guided_half_precision_predictions_are_combined_in_fp32() -> None:
    x, f, history = (t.float() for t in drawn(guided=True, learned=False))
    other, table = x.clone(), make_table(ROWS["guided"], dtype=torch.float32)
    sampler_step(x, f.bfloat16(), history, table, torch.tensor(0), SEEDS)
    sampler_step(other, f.bfloat16().float(), history, table, torch.tensor(0), SEEDS)
    assert torch.equal(x, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x_is_kept_in_single_precision(dtype: torch.dtype) -> None:
    x, f, history = (t.to(dtype) for t in drawn(guided=False, learned=False))
    with pytest.raises(ValueError, match=r"fp32, got torch\.\w+ of .*keep x in fp32"):
        sampler_step(x, f, history, make_table({}, dtype=dtype), torch.tensor(0), SEEDS)
