"""sampler_step: each term of a row, against the same row written out in NumPy."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import kernels
from fastdiff.diffusion.samplers import SAMPLERS, build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.kernels import COLUMNS, SAMPLER_NOISE, _sampler_step_cuda, philox_normal, sampler_step
from fastdiff.kernels import triton as _triton
from fastdiff.kernels._sampler_step import run_step
from fastdiff.kernels.tuning import configs
from tests.kernels import cases
from tests.kernels.cases import recording
from tests.kernels.graphs import captured, no_waiting
from tests.kernels.interpreter import counting_traffic
from tests.support.parity import assert_parity_in_one_draw

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


def stepped(
    backend: str,
    x: torch.Tensor,
    f: torch.Tensor,
    history: torch.Tensor,
    table: torch.Tensor,
    *,
    step: int = 0,
    seeds: torch.Tensor = SEEDS,
    rescale: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and history after a step of one backend, on copies with the same strides."""
    device = cases.device_of(backend)
    x, history = x.to(device, copy=True), history.to(device, copy=True)
    index = torch.tensor(step, device=device)
    with kernels.backend(backend), recording("sampler_step") as ran:
        rest = f.to(device), history, table.to(device), index, seeds.to(device)
        sampler_step(x, *rest, guidance_rescale=rescale)
    assert ran == [backend]
    return x.cpu(), history.cpu()


def check_row(
    backend: str, row: dict[COLUMNS, float], f_dtype: torch.dtype, *, guided: bool, learned: bool
) -> None:
    """One step in fp32, with and without rescaling, against NumPy in fp64 by the rule of parity."""
    x, f, history = (t.float() for t in drawn(guided=guided, learned=learned))
    f = f.to(f_dtype)
    table = make_table(row, dtype=torch.float32)
    noise = philox_normal(SEEDS, x.shape[1:], step=0, stream=SAMPLER_NOISE)
    inputs = x, f.float(), history, table[0], noise
    for rescale in (0.0, 0.7) if guided else (0.0,):
        exact = by_hand(*(t.double().numpy().copy() for t in inputs), rescale)
        eager = by_hand(*(t.numpy().copy() for t in inputs), rescale)
        results = stepped(backend, x, f, history, table, rescale=rescale)
        for result, wanted, usual in zip(results, exact, eager, strict=True):
            assert_parity_in_one_draw(result, torch.from_numpy(wanted), torch.from_numpy(usual))


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_fp32_parity(name: str, guided: bool, learned: bool, backend: str) -> None:
    check_row(backend, ROWS[name], torch.float32, guided=guided, learned=learned)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_fp32_parity_at_drawn_rows(backend: str, data: st.DataObject) -> None:
    guided, learned = data.draw(st.booleans()), data.draw(st.booleans())
    coefficient = st.floats(-3, 3, width=16)
    row = {column: data.draw(coefficient) for column in (*FULL, *STORE, C.S, C.W)}
    row |= {C.SLOT: data.draw(st.integers(-1, 2)), C.LOGVAR_MIN: -2.0, C.LOGVAR_MAX: 0.5}
    row[C.CLAMP] = data.draw(st.sampled_from([0.5, 1.0, math.inf]))
    f_dtype = data.draw(st.sampled_from(cases.DTYPES))
    check_row(backend, row, f_dtype, guided=guided, learned=learned)


LINEAR = NoiseSchedule(ScheduleConfig())


def network(x: torch.Tensor, *, learned: bool) -> torch.Tensor:
    """Two halves with channels that differ; something smooth that is not linear."""
    cond = torch.tanh(x) + 0.3 * torch.sin(3 * x)
    f = torch.cat([0.8 * cond - 0.1 * x, cond])
    return torch.cat([f, torch.cos(2 * f)], dim=1) if learned else f


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("name", [*SAMPLERS, "ddpm-learned", "clamped", "rescaled"])
def test_a_whole_trajectory_of_every_sampler(name: str, backend: str) -> None:
    """10 steps with guidance and noise: fp32 on each backend, by parity with fp64.

    All runs get the predictions of one fp32 run: a network fed with its own results would make
    errors of the last place large or small by luck.
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
    start = torch.randn(3, 2, 6, 5)

    predictions: list[torch.Tensor] = []

    def run(backend: str, dtype: torch.dtype) -> torch.Tensor:
        x, columns = start.to(dtype), table.columns.float().to(dtype)
        history = torch.full((3, *x.shape), math.nan, dtype=dtype)
        for row in range(len(table)):
            if row == len(predictions):
                predictions.append(network(x, learned=learned))
            f = predictions[row].to(dtype)
            x, history = stepped(backend, x, f, history, columns, step=row, rescale=rescale)
        return x

    eager, exact = run("reference", torch.float32), run("reference", torch.float64)
    assert exact.isfinite().all()
    assert_parity_in_one_draw(run(backend, torch.float32), exact, eager)


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


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_views_are_written_through(backend: str) -> None:
    """x as (H, W, C, N) in memory, and as a part whose rows have gaps."""
    device = cases.device_of(backend)
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    table = make_table(ROWS["multistep"], dtype=torch.float32)
    expected, slots = stepped(backend, x, f, history, table)
    stored = x.permute(2, 3, 1, 0).contiguous().to(device)
    wide, wider = torch.zeros(3, 2, 4, 8, device=device), torch.zeros(3, 3, 2, 4, 8, device=device)
    wide[..., 2:7], wider[..., 2:7] = x.to(device), history.to(device)
    rest = table.to(device), torch.tensor(0, device=device), SEEDS.to(device)
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
    """Element e of the noise is that of the logical order, whatever the memory's."""
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
    rest = (t.to(device) for t in (f, history, table, torch.tensor(0), SEEDS))
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
    """A mean far from 0, which one pass over squares would lose; several tiles to each part. The
    channels of a learned variance, which lie between the others in channels_last, are left out."""
    shape = (2, 4, 20, 27)  # 9 tiles of 256
    x, history = torch.zeros(shape), torch.zeros(3, *shape)
    f = 300 + torch.randn(4, 4, 20, 27) * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None, None, None]
    f = torch.cat([f, 50 * f], dim=1) if learned else f
    f = cases.channels_last(f) if layout == "channels_last" else f
    table = make_table({C.V: 1.0, C.B: 1.0, C.W: 3.0}, dtype=torch.float32)
    wide = (x.double(), f.double(), history.double(), table.double())
    exact, _ = stepped("reference", *wide, seeds=SEEDS[:2], rescale=0.9)
    eager, _ = stepped("reference", x, f, history, table, seeds=SEEDS[:2], rescale=0.9)
    config = {"BLOCK": 32, "num_warps": 4}
    with pytest.MonkeyPatch.context() as patch, configs.override_config("sampler_step", config):
        patch.setattr(sys.modules[run_step.__module__], "PARTS", 3)
        patch.setattr(_sampler_step_cuda, "PARTS", 2)  # tiles of 1024
        result, _ = stepped(backend, x, f, history, table, seeds=SEEDS[:2], rescale=0.9)
    assert_parity_in_one_draw(result, exact, eager)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_half_precision_predictions_and_empty_batches(backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=False, learned=False))
    table = make_table(ROWS["ddim"], dtype=torch.float32)
    half, _ = stepped(backend, x, f.bfloat16(), history, table)
    assert torch.equal(half, stepped(backend, x, f.bfloat16().float(), history, table)[0])
    stepped(backend, x[:0], f[:0], history[:, :0], table, seeds=SEEDS[:0])


@pytest.mark.parametrize("backend", cases.KERNELS)
@pytest.mark.parametrize("step", [-1, 1, 2**40])
def test_kernels_make_nan_of_a_step_beyond_the_table(step: int, backend: str) -> None:
    x, f, history = (t.float() for t in drawn(guided=True, learned=True))
    table = make_table(ROWS["multistep"], dtype=torch.float32)
    for rescale in (0.0, 0.7):
        out, slots = stepped(backend, x, f, history, table, step=step, rescale=rescale)
        assert out.isnan().all()
        assert torch.equal(slots, history)


@cases.needs_triton
def test_how_many_kernels_triton_launches() -> None:
    x, f = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(4, 4, 8, 8, device="meta")
    history, table = torch.empty(3, 2, 4, 8, 8, device="meta"), torch.empty(5, 16, device="meta")
    step = torch.empty((), dtype=torch.int64, device="meta")
    seeds = torch.empty(2, dtype=torch.int64, device="meta")
    for rescale, names in (
        (0.0, ["_sampler_step_kernel"]),
        (0.7, ["_moments_kernel", "_sampler_step_kernel"]),
    ):
        with _triton.recording_launches("sm_90") as launches:
            run_step(x, f, history, table, step, seeds, rescale)
        assert [launch.kernel.__name__ for launch in launches] == names


@cases.needs_triton
def test_triton_objections() -> None:
    x, f, history = drawn(guided=False, learned=False)
    table, step = make_table(ROWS["ddim"]), torch.tensor(0)
    objection = kernels.OPS["sampler_step"].backends["triton"].why_not
    arguments = x, f, history, table, step, SEEDS
    assert "got float64" in objection(*arguments, 0.0)
    arguments = x.float(), f.float(), history.float(), table.float(), step.to("meta"), SEEDS
    assert "step must be on the device of x" in objection(*arguments, 0.0)


@cases.needs_triton
def test_triton_op_is_registered_right_and_compiles_without_break() -> None:
    device = cases.device_of("triton")
    table = make_table(ROWS["multistep"], ROWS["guided"], dtype=torch.float32).to(device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(sampler_step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 7, 9):  # a size that another dimension has is one more graph
        x, f, history = (t.float().to(device) for t in drawn(n, guided=True, learned=False))
        rest = table, torch.tensor(1, device=device), torch.arange(n, device=device)
        if n == 6:
            cases.check_registration("sampler_step", "triton", x, f, history, *rest, 0.5)
        mine, slots = x.clone(), history.clone()
        with kernels.backend("triton"):
            compiled(mine, f, slots, *rest)
            sampler_step(x, f, history, *rest)
        assert torch.equal(mine, x)
        assert torch.equal(slots, history)
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
    """`slots` are read or written."""
    x, history = torch.randn(2, 4, 16, 16), torch.randn(3, 2, 4, 16, 16)
    f = torch.randn(2 * (1 + guided), 8, 16, 16).to(dtype)
    table = make_table(ROWS[name], dtype=torch.float32)
    learned = name == "ancestral"  # the variance is read for the noise only
    once, prediction = x.numel() * 4, x.numel() * f.itemsize
    with counting_traffic() as traffic:
        stepped("triton", x, f, history, table, seeds=SEEDS[:2])
    expected = (2 + slots) * once + (1 + guided + learned) * prediction
    assert traffic.total == pytest.approx(expected, rel=0.05)
    if guided:
        with counting_traffic() as traffic:
            stepped("triton", x, f, history, table, seeds=SEEDS[:2], rescale=0.5)
        assert traffic.total == pytest.approx(expected + 2 * prediction, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_captured_step_replays_with_another_step_seed_and_table(
    rescale: float, backend: str
) -> None:
    """And neither the launch nor the replay waits for the device."""
    if kernels.available()["sampler_step"][backend] is not None:
        pytest.skip(f"no {backend} kernels here")
    x, f, history = (t.float().cuda() for t in drawn(guided=True, learned=False))
    table = make_table(ROWS["guided"], ROWS["multistep"], dtype=torch.float32).cuda()
    step, seeds = torch.tensor(0, device="cuda"), SEEDS.cuda()
    start, slots = x.clone(), history.clone()
    with kernels.backend(backend):
        graph, _ = captured(
            lambda: sampler_step(x, f, history, table, step, seeds, guidance_rescale=rescale)
        )
        with no_waiting():
            sampler_step(x, f, history, table, step, seeds, guidance_rescale=rescale)
        for row, shift, factor in ((0, 0, 1.0), (1, 0, 1.0), (0, 5, 1.0), (1, 5, 0.5)):
            x.copy_(start), history.copy_(slots)
            step.fill_(row), seeds.add_(shift), table[:, C.A].mul_(factor)
            graph.replay()
            have, kept = x.clone(), history.clone()
            x.copy_(start), history.copy_(slots)
            sampler_step(x, f, history, table, step, seeds, guidance_rescale=rescale)
            assert torch.equal(have, x)
            assert torch.equal(kept, history)


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


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (1,), (3, 7, 11)])
@pytest.mark.parametrize("value", [1.0, 0.1, 0.3, 0.7, 1 / 3])
def test_rescaling_a_constant_prediction_leaves_it_alone(
    value: float, shape: tuple[int, ...], backend: str
) -> None:
    """A new model predicts 0 everywhere: std 0, and 0 / 0 in the formula."""
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
        sampler_step(x, f, history, make_table({}, dtype=dtype), torch.tensor(0), SEEDS)
