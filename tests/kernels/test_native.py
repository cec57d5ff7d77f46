"""The compiled module: that it is the one of these sources, its instruction sets, its threads; what
holds for every CPU kernel; and what happens where it is not built."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff import kernels
from fastdiff.cli.doctor import ordinary_call
from fastdiff.kernels import extension
from fastdiff.kernels.philox import philox4x32
from tests.kernels import cases

ROOT = Path(__file__).resolve().parent.parent.parent
native = extension.native
ISAS = native.build()["isas"] if native else ("portable", "avx2", "avx512")
ROWS = {
    "geglu": cases.GEGLU,
    "group_norm_silu": cases.GROUP_NORM_SILU,
    "add_group_norm_silu": cases.ADD_GROUP_NORM_SILU,
    "layer_norm": cases.LAYER_NORM,
    "add_layer_norm": cases.ADD_LAYER_NORM,
}
"""Op -> its rows, for the ops with a CPU kernel that a tolerance can judge."""


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use while the test runs."""
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
    told = extension.describe()
    assert not told["stale"], "csrc/ has changed since: run 'make build'"
    assert told["isa"] in told["isas"]
    assert Path(told["path"]).parent == Path(kernels.__file__).parent


@cases.needs_native
def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="'mmx' is not compiled in or not in this CPU"):
        native.use_isa("mmx")
    assert native.isa() != "mmx"


@cases.needs_native
def test_loops_run_on_the_threads_of_torch() -> None:
    assert native.has_parallel_for()  # the torch of constraints.txt has the function


@cases.needs_native
def test_philox_words() -> None:
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
    "layer_norm": lambda: ((numbers(SAMPLES, 50, 600), numbers(600), numbers(600)), {}),
    "add_layer_norm": lambda: ((numbers(SAMPLES, 50, 600), numbers(SAMPLES, 50, 600)), {}),
}
"""Op -> a call that is worth several threads; the first dimension is the sample."""


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
    """Its result, and every gradient of its own (a parameter's is a sum over the batch)."""

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


WITHOUT = """
import sys
sys.modules["fastdiff.kernels._native"] = None
import torch
from fastdiff import kernels
x = torch.randn(2, 8)
assert kernels.explain("geglu", x).chosen == "reference"
kernels.geglu(x)
with kernels.backend("cpu"):
    try:
        kernels.geglu(x)
    except kernels.BackendError as error:
        print(error)
"""


def test_without_the_module_the_reference_serves_and_the_reason_is_given() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "cpu: the compiled module is not built here; with a C++ compiler, 'make build'" in (
        ran.stdout
    )


@cases.needs_native
@pytest.mark.parametrize("op", sorted(kernels.OPS))
def test_auto_takes_the_cpu_kernel_where_there_is_one(op: str) -> None:
    args, kwargs = ordinary_call(op, "cpu")
    expected = "cpu" if "cpu" in kernels.OPS[op].implementations else "reference"
    assert kernels.explain(op, *args, **kwargs).chosen == expected
