"""The compiled module: whether it is up to date, its instruction sets and threads, properties of
all CPU kernels, and behaviour without the module."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff import kernels
from fastdiff.kernels import compiled
from fastdiff.kernels.philox_normal import philox4x32
from tests.kernels import cases
from tests.kernels.test_cat_group_norm_silu import ROWS as CAT_GROUP_NORM_SILU
from tests.kernels.test_gate_residual import ROWS as GATE_RESIDUAL
from tests.kernels.test_philox import VECTORS

ROOT = Path(__file__).resolve().parent.parent.parent
native = compiled.native
ISAS = native.build()["isas"] if native else ("portable", "avx2", "avx512")
ROWS = {
    "geglu": cases.GEGLU,
    "group_norm_silu": cases.GROUP_NORM_SILU,
    "add_group_norm_silu": cases.ADD_GROUP_NORM_SILU,
    "cat_group_norm_silu": CAT_GROUP_NORM_SILU,
    "layer_norm": cases.LAYER_NORM,
    "add_layer_norm": cases.ADD_LAYER_NORM,
    "attention": cases.ATTENTION,
    "gate_residual": GATE_RESIDUAL,
}
"""Op -> its cases, for ops with a CPU kernel whose results can be compared under a tolerance."""


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Use an instruction set while the test runs."""
    if native is None:
        pytest.skip("the compiled module is not built here")
    before = native.isa()
    try:
        native.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.use_isa(before)


@cases.needs_native
def test_the_module_is_built_from_these_sources() -> None:
    module = compiled.describe()
    assert not module["stale"], "csrc/ has changed since the build; run 'make build'"
    assert module["isa"] in module["isas"]
    assert Path(module["path"]).parent == Path(kernels.__file__).parent


@cases.needs_native
def test_an_instruction_set_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'mmx' is not compiled in or not in this CPU"):
        native.use_isa("mmx")
    assert native.isa() != "mmx"


@cases.needs_native
def test_loops_run_on_the_threads_of_torch() -> None:
    assert native.has_parallel_for()  # the version of torch in constraints.txt has it


@cases.needs_native
def test_an_error_in_a_thread_is_an_error_of_the_call() -> None:
    """The thread pool is a C function, which can only report an error as a number."""
    x = torch.zeros(64)
    arguments = (0, False, x.data_ptr(), 0, 0, x.data_ptr(), 0, 0)
    with pytest.raises(MemoryError):  # the threads' buffers
        native.layer_norm(*arguments, 64, 2**58, 0, 0, 1e-5)

    @ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_void_p)
    def broken(begin: int, end: int, grain: int, function: int, context: int) -> int:
        return 1

    native.set_parallel_for(ctypes.cast(broken, ctypes.c_void_p).value)
    try:
        with pytest.raises(RuntimeError, match="torch's thread pool failed"):
            native.layer_norm(*arguments, 100_000, 64, 0, 0, 1e-5)
    finally:
        native.set_parallel_for(compiled._find_parallel_for())


@cases.needs_native
def test_philox_words() -> None:
    """The words equal the published ones and those of the reference."""
    for _, counter, key, result in VECTORS:
        assert tuple(native.philox4x32(counter, key)) == result
    words = torch.randint(2**32, (50, 6))
    words[0], words[1] = 0, 2**32 - 1
    expected = philox4x32(words[:, :4], words[:, 4:]).tolist()
    assert [native.philox4x32(row[:4], row[4:]) for row in words.tolist()] == expected


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("op", ROWS)
def test_parity_on_every_instruction_set(op: str, isa: str) -> None:
    for case in ROWS[op]:
        for dtype in cases.DTYPES:
            cases.check(op, case, dtype, "cpu")


SAMPLES = 7


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape)


BIG: dict[str, Callable[[], tuple[tuple, dict]]] = {
    "geglu": lambda: ((numbers(SAMPLES, 50, 1200),), {}),
    "group_norm_silu": lambda: (
        (numbers(SAMPLES, 96, 40, 30), 8, numbers(96), numbers(96)),
        {"scale_shift": numbers(SAMPLES, 192)},
    ),
    "add_group_norm_silu": lambda: (
        (cases.channels_last(numbers(SAMPLES, 96, 60, 50)), 8, numbers(96), numbers(96)),
        {"residual": numbers(SAMPLES, 96, 60, 50), "channel_add": numbers(SAMPLES, 96)},
    ),
    "cat_group_norm_silu": lambda: (
        (
            *(cases.channels_last(numbers(SAMPLES, c, 60, 50)) for c in (60, 36)),
            *(8, numbers(96), numbers(96)),
        ),
        {"residual": numbers(SAMPLES, 60, 60, 50), "channel_add": numbers(SAMPLES, 60)},
    ),
    "layer_norm": lambda: ((numbers(SAMPLES, 50, 600), numbers(600), numbers(600)), {}),
    "add_layer_norm": lambda: ((numbers(SAMPLES, 50, 600), numbers(SAMPLES, 50, 600)), {}),
    "gate_residual": lambda: (
        (numbers(SAMPLES, 50, 600), numbers(SAMPLES, 600), numbers(SAMPLES, 50, 600)),
        {},
    ),
    "attention": lambda: (  # several tiles, and one block of keys that also has extra keys
        (numbers(SAMPLES, 90, 3, 40), *numbers(2, SAMPLES, 300, 3, 40)),
        {
            "extra_k": numbers(SAMPLES, 30, 3, 40),
            "extra_v": numbers(SAMPLES, 30, 3, 40),
            "mask": numbers(SAMPLES, 1, 90, 330) < 1,
        },
    ),
}
"""Op -> a call large enough for several threads; the first dimension is the batch."""


@cases.needs_native
@pytest.mark.parametrize("op", BIG)
def test_bits_do_not_depend_on_the_number_of_threads(op: str) -> None:
    before, results = torch.get_num_threads(), []
    inputs = cases.with_gradients(BIG[op]())
    with kernels.backend("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs, gradients = cases.run(getattr(kernels, op), inputs)
            results.append([*outputs, *gradients])
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@cases.needs_native
@pytest.mark.parametrize("op", BIG)
def test_a_sample_has_the_same_bits_alone(op: str) -> None:
    """This holds for the result and for all gradients but those of parameters, which are sums over
    the batch."""

    def pick(a: object, i: int) -> object:
        ours = isinstance(a, Tensor) and len(a) == SAMPLES
        return a[i : i + 1].clone() if ours else a

    def call(args: tuple, kwargs: dict) -> list[Tensor]:
        outputs = function(*args, **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = cases.tensors_in((args, kwargs))
        gradients = torch.autograd.grad([y.square().sum() for y in outputs], leaves)
        own = [g for x, g in zip(leaves, gradients, strict=True) if len(x) == len(outputs[0])]
        return [*outputs, *own]

    args, kwargs = BIG[op]()
    function = getattr(kernels, op)
    with kernels.backend("cpu"):
        together = call(*cases.with_gradients((args, kwargs)))
        for i in (0, 3, SAMPLES - 1):
            picked = tuple(pick(a, i) for a in args), {k: pick(v, i) for k, v in kwargs.items()}
            alone = call(*cases.with_gradients(picked))
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_normals_are_within_two_ulp(isa: str) -> None:
    seeds = torch.tensor([0, 5, 2**62 + 12345, -1])
    for shape, step, stream in (((70_001,), 0, 0), ((3, 5, 7), 2**32 - 1, 1), ((1,), 3, 2)):
        with kernels.backend("cpu"):
            z = kernels.philox_normal(seeds, shape, step=torch.tensor(step), stream=stream)
        with kernels.backend("reference"):
            expected = kernels.philox_normal(seeds, shape, step=step, stream=stream)
        places = z.view(torch.int32).long() - expected.view(torch.int32).long()
        assert places.abs().max() <= 2
        assert (places != 0).double().mean() < 1e-4  # both round an fp64 value once


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("space", [(8, 8), (5, 7), (40, 33)])
def test_sampler_step(isa: str, space: tuple[int, int], guided: bool, learned: bool) -> None:
    """Results agree with the fp64 reference for every layout and dtype of the prediction."""
    x, history = torch.randn(3, 4, *space), torch.randn(3, 3, 4, *space)
    prediction = torch.randn(6 if guided else 3, 8 if learned else 4, *space)
    table = torch.randn(2, 20)
    table[:, 10:15] = torch.tensor([1.0, 2.5, 2.0, -1.0, 0.5])  # SLOT, W, CLAMP, LOGVAR_MIN, _MAX
    table[:, 15] = torch.tensor([4.0, 9.0])  # NOISE_STEP
    seeds, rows = torch.tensor([7, 8, 9]), torch.tensor([1, 0, 1])
    pair = {"cond": torch.tensor([3, 4, 5]), "uncond": torch.tensor([0, 1, 2])} if guided else {}
    for dtype in cases.DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            f = prediction.to(dtype).contiguous(memory_format=layout)
            for rescale in (0.0, 0.7):
                table[:, 16] = rescale
                results = {}
                for backend, wide in (("cpu", torch.float32), ("reference", torch.float64)):
                    out, slots = x.to(wide, copy=True), history.to(wide, copy=True)
                    with kernels.backend(backend):
                        kernels.sampler_step(out, f, slots, table.to(wide), rows, seeds, **pair)
                    results[backend] = (out.double(), slots.double())
                for have, want in zip(results["cpu"], results["reference"], strict=True):
                    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


@cases.needs_native
@pytest.mark.parametrize("graph", [False, True])
def test_sampler_step_compiles(graph: bool) -> None:
    """Strided outputs are written in place."""
    torch._dynamo.reset()
    x, history = cases.channels_last(torch.randn(2, 4, 6, 6)), torch.zeros(3, 2, 4, 6, 6)
    table = torch.rand(2, 20)
    table[:, 10] = 0
    seeds, rows = torch.tensor([1, 2]), torch.tensor([1, 0])
    expected, slots = x.clone(), history.clone()
    estimates = [cases.channels_last(torch.zeros(2, 4, 6, 6)) for _ in range(2)]
    flags = [torch.ones(4, dtype=torch.bool)[::2] for _ in range(2)]
    f = x.clone()
    f[1, 0, 0, 0] = math.inf

    def call(x: Tensor, f: Tensor, history: Tensor, denoised: Tensor, finite: Tensor) -> Tensor:
        kernels.sampler_step(x, f, history, table, rows, seeds, denoised=denoised, finite=finite)
        return x * 1

    with kernels.backend("reference"):
        call(expected, f, slots, estimates[0], flags[0])
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if graph else call
    with kernels.backend("cpu"):
        y = function(x, f, history, estimates[1], flags[1])
    for have, want in ((y, expected), (x, expected), (history, slots), estimates):
        torch.testing.assert_close(have, want)
    assert flags[0].tolist() == flags[1].tolist() == [True, False]


@cases.needs_native
def test_sampler_step_is_registered_right() -> None:
    x, index = torch.randn(2, 4, 6, 6), torch.tensor([1, 0])
    table, f, history = torch.rand(2, 20), torch.randn(4, 8, 6, 6), torch.zeros(3, 2, 4, 6, 6)
    finite = torch.ones(2, dtype=torch.bool)
    for options in (
        (index + 2, index, x.clone(), finite, torch.zeros(2), True),
        (index, None, None, None, None, False),
    ):
        arguments = x, f, history, table, index, index, *options
        cases.check_registration("sampler_step", "cpu", *arguments)


WITHOUT = """
import sys
import warnings
sys.modules["fastdiff.kernels._native"] = None
import torch
from fastdiff import kernels
x = torch.randn(2, 8)
assert kernels.explain("geglu", x).chosen == "reference"
for _ in range(2):
    with warnings.catch_warnings(record=True) as caught:
        kernels.geglu(x)
    print(*[w.message for w in caught], sep="\\n")
with kernels.backend("cpu"):
    try:
        kernels.geglu(x)
    except kernels.BackendError as error:
        print(error)
"""


def test_without_the_module_the_reference_runs_and_the_reason_is_given() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-W", "always::UserWarning", "-c", WITHOUT],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    reason = "the compiled module has not been built; install a C++ compiler, then run 'make build'"
    assert f"cpu: {reason}" in ran.stdout
    warning = f"fastdiff runs without its cpu kernels, which is slower: {reason}"
    assert ran.stdout.count(warning) == 1, ran.stdout


@cases.needs_native
@pytest.mark.parametrize("op", sorted(kernels.OPS))
def test_auto_selects_the_cpu_kernel(op: str) -> None:
    assert kernels.explain(op, **kernels.OPS[op].example(torch.zeros)).chosen == "cpu"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cases.needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("op", BIG)
def test_the_default_dtype_and_device_have_no_effect(op: str, dtype: torch.dtype) -> None:
    """Kernels write fp32 to raw addresses, and would write past a buffer of a smaller dtype."""
    inputs = cases.with_gradients(BIG[op]())
    leaves, function = cases.tensors_in(inputs), getattr(kernels, op)

    def run() -> list[Tensor]:
        outputs = cases.flat(function(*inputs[0], **inputs[1]))
        return [*outputs, *torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])]

    with kernels.backend("cpu"):
        expected = run()
        with default_dtype(dtype):
            found = run()
        with torch.no_grad():
            alone = cases.flat(function(*inputs[0], **inputs[1]))
            with torch.device("meta"):
                elsewhere = cases.flat(function(*inputs[0], **inputs[1]))
    for have, want in zip((*found, *elsewhere), (*expected, *alone), strict=True):
        assert torch.equal(have, want)


@cases.needs_native
def test_noise_is_fp32_for_any_default_dtype() -> None:
    seeds = torch.arange(3)
    with kernels.backend("cpu"):
        expected = kernels.philox_normal(seeds, (4, 9))
        with default_dtype(torch.float64):
            assert torch.equal(kernels.philox_normal(seeds, (4, 9)), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("op", BIG)
def test_forward_mode_derivatives_are_the_references(op: str) -> None:
    """Kernels do not support forward mode and would give zeros, so `auto` uses the reference and a
    forced kernel raises."""
    args, kwargs = BIG[op]()

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def function(x: Tensor) -> Tensor:
        rest, options = args[1:], kwargs
        if x.dtype is torch.float64:
            rest, options = tuple(map(wide, rest)), {name: wide(v) for name, v in kwargs.items()}
        return cases.flat(getattr(kernels, op)(x, *rest, **options))[0]

    x, tangent = args[0], torch.randn_like(args[0])
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's only backend with these derivatives
        _, found = torch.func.jvp(function, (x,), (tangent,))
    step = 1e-5 * tangent.double()
    differences = (function(x.double() + step) - function(x.double() - step)) / 2e-5
    torch.testing.assert_close(found.double(), differences, rtol=1e-3, atol=1e-4)
    if compiled.native is not None:
        refused = pytest.raises(kernels.BackendError, match=r"under torch\.func")
        with kernels.backend("cpu"), refused:
            torch.func.jvp(function, (x,), (tangent,))
