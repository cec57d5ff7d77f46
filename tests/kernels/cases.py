"""Inputs, formulas and the parity check that every backend of an op has to pass.

A `Case` is one row: which input, and why it is there. `check(op, case, dtype, backend)` runs the
public function on one backend, asserts that this backend ran, and compares results and gradients
with the fp64 formula under the rule of tests/support/parity.py. The tests of a Triton, CUDA or CPU
implementation call it with the name of their backend.
"""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import compiled
from fastdiff.kernels import cuda as _cuda
from fastdiff.kernels import triton as _triton
from fastdiff.kernels.choose import UNAVAILABLE
from tests import cuda_host
from tests.kernels import interpreter  # noqa: F401 - imported so that Triton rounds as GPUs do
from tests.support.parity import assert_gradient_parity, assert_parity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
needs_triton = pytest.mark.skipif(
    not torch.cuda.is_available() and not _triton.INTERPRETED,
    reason="Triton kernels need a GPU, or triton and TRITON_INTERPRET=1",
)
needs_interpreter = pytest.mark.skipif(
    not _triton.INTERPRETED, reason="only Triton's interpreter can count this"
)
needs_native = pytest.mark.skipif(
    compiled.native is None, reason="the compiled module is not built here"
)
BACKENDS = [
    "reference",
    pytest.param("triton", marks=needs_triton),
    pytest.param("cpu", marks=needs_native),
]
"""For parametrize: the backends that implement every op."""
if torch.cuda.is_available():
    needs_cuda = pytest.mark.skipif(
        not _cuda.built(), reason=UNAVAILABLE.get("cuda", "the module has no CUDA kernels")
    )
else:
    needs_cuda = pytest.mark.skipif(
        bool(cuda_host.needs_compiler.args[0]), reason="neither a GPU nor g++ for the emulation"
    )
needs_clusters = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9,
    reason="thread-block clusters need sm_90",
)
ALL_BACKENDS = [*BACKENDS, pytest.param("cuda", marks=needs_cuda)]
"""For ops that also have CUDA kernels, which run under the emulation if there is no GPU
(conftest.py)."""
KERNELS: list[Any] = [BACKENDS[1], ALL_BACKENDS[-1]]
"""The backends written for a GPU."""
INTERPRETED_DRAWS = 8
"""Number of shapes hypothesis draws for a kernel in Triton's interpreter; each takes a second."""


def device_of(backend: str) -> str:
    """The device the tests run a backend on: the GPU, if there is one and the backend uses it."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Draw:
    """Draws the numbers of a case, rounded to its dtype so that fp64 gets the same values."""

    dtype: torch.dtype
    device: str
    generator: torch.Generator

    def __call__(self, *shape: int, mean: float = 0.3, std: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (numbers * std + mean).to(self.dtype).to(self.device)


@dataclass(frozen=True)
class Case:
    """One row of a parity test."""

    name: str
    reason: str
    build: Callable[[Draw], Inputs]

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + seed)
        return self.build(Draw(dtype, device, generator))

    def __str__(self) -> str:
        return self.name


# Eager PyTorch, as people write it today, in the dtype of the input. GroupNorm gets a contiguous
# copy, because PyTorch's own CPU kernel for channels_last loses every digit when the mean is large
# and a comparison with it would prove nothing.


def group_norm_silu_eager(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    if x.numel() == 0:
        return x * 1
    y = torch.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    if scale_shift is not None:
        shape = (len(x), x.shape[1], *[1] * (x.ndim - 2))
        scale, shift = (half.reshape(shape) for half in scale_shift.chunk(2, dim=1))
        y = y * (1 + scale) + shift
    return F.silu(y) if activation == "silu" else y


def add_group_norm_silu_eager(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    if channel_add is not None:
        x = x + channel_add.reshape(*channel_add.shape, *[1] * (x.ndim - 2))
    if residual is not None:
        x = x + residual
    return group_norm_silu_eager(x, num_groups, weight, bias, **rest), x


def with_extra(
    k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None
) -> tuple[Tensor, Tensor]:
    if extra_k is None or extra_v is None:
        return k, v
    return torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)


def attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    k, v = with_extra(k, v, extra_k, extra_v)
    if q.numel() == 0 or k.numel() == 0:
        return q * 0
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def geglu_eager(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def layer_norm_eager(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm_eager(
    x: Tensor, residual: Tensor, *parameters: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    return layer_norm_eager(x + residual, *parameters, eps=eps), x + residual


EAGER: dict[str, Callable[..., Any]] = {
    "group_norm_silu": group_norm_silu_eager,
    "add_group_norm_silu": add_group_norm_silu_eager,
    "attention": attention_eager,
    "geglu": geglu_eager,
    "layer_norm": layer_norm_eager,
    "add_layer_norm": add_layer_norm_eager,
}
"""Op -> its eager PyTorch version. Test files of other ops add theirs."""


def exact(op: str, *args: Any, **options: Any) -> Any:
    """An op's formula in fp64."""
    wide = (a.double() if isinstance(a, Tensor) else a for a in args)
    return kernels.OPS[op].formula(*wide, **options)


# The check


@contextmanager
def recording(op: str) -> Iterator[list[str]]:
    """Yield the list of backends that actually ran `op` inside the block, in order."""
    ran: list[str] = []

    def recorded(backend: kernels.Backend) -> kernels.Backend:
        def noting(forward: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any) -> Any:
                ran.append(backend.name)
                return forward(*args)

            return noted

        return backend.wrapped(noting)

    before = kernels.OPS[op].backends
    kernels.OPS[op].use({name: recorded(backend) for name, backend in before.items()})
    try:
        yield ran
    finally:
        kernels.OPS[op].use(before)


def tensors_in(inputs: Inputs) -> list[Tensor]:
    """The floating-point tensors among the arguments, in order; these receive gradients."""
    args, kwargs = inputs
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return [t for t in tensors if t.is_floating_point()]


def with_gradients(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The arguments as new leaves that require gradients, with the same strides and, if given, in
    `dtype`."""

    def leaf(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return (a if dtype is None else a.to(dtype)).detach().requires_grad_()

    args, kwargs = inputs
    return tuple(leaf(a) for a in args), {name: leaf(a) for name, a in kwargs.items()}


def run(
    function: Callable[..., Any], inputs: Inputs, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of their weighted sum; the seed determines the weights."""
    args, kwargs = inputs
    outputs = function(*args, **kwargs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1 + seed)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype).to(o.device) for o in outputs]
    gradients = torch.autograd.grad(outputs, tensors_in(inputs), weights, allow_unused=True)
    leaves = tensors_in(inputs)
    filled = [
        torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)
    ]
    return [o.detach() for o in outputs], filled


def flat(result: Any) -> list[Tensor]:
    """What an op returns, as a list."""
    return list(result) if isinstance(result, tuple) else [result]


def check(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Compare results and gradients of one op on one backend with the fp64 formula.

    Without a GPU, "cuda" means the emulation on a CPU, where each dtype uses a different order of
    threads.
    """

    if backend == "cuda" and not torch.cuda.is_available():
        with cuda_host.emulated(list(cuda_host.ORDERS)[DTYPES.index(dtype)]):
            check_case(op, case, dtype, backend)
    else:
        check_case(op, case, dtype, backend)


def run_on(
    backend: str, op: str, inputs: Inputs, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """`run` an op on a backend, and assert that it ran there."""
    with ExitStack() as stack:
        stack.enter_context(kernels.backend(backend))
        # with nothing to add, an add_ op calls the op without
        names = {op, op.removeprefix("add_")}
        ran = [stack.enter_context(recording(name)) for name in names if name in kernels.OPS]
        results = run(getattr(kernels, op), with_gradients(inputs), seed)
    assert [name for each in ran for name in each] == [backend], (op, backend, ran)
    return results


Results = tuple[list[Tensor], list[Tensor]]
"""Outputs and gradients."""


def formulas(op: str, inputs: Inputs, seed: int) -> tuple[Results, Results]:
    """The formula in fp64, and eager PyTorch in the dtype of the inputs."""
    exact = run(kernels.OPS[op].formula, with_gradients(inputs, torch.float64), seed)
    return exact, run(EAGER[op], with_gradients(inputs), seed)


@lru_cache(maxsize=1024)
def formulas_of_case(
    op: str, case: Case, dtype: torch.dtype, device: str, seed: int
) -> tuple[Results, Results]:
    """`formulas` of a case, cached because every backend and regime needs the same."""
    return formulas(op, case.inputs(dtype, device, seed), seed)


def check_case(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """`check`, without setting the order of the emulation's threads."""
    device = device_of(backend)
    known = partial(formulas_of_case, op, case, dtype, device)
    check_inputs(op, lambda seed: case.inputs(dtype, device, seed), backend, known)


def check_inputs(
    op: str,
    inputs: Callable[[int], Inputs],
    backend: str,
    known: Callable[[int], tuple[Results, Results]] | None = None,
) -> None:
    """`check_case` for inputs that are a function of a seed; `known` returns their `formulas`."""
    if known is None:
        known = cache(lambda seed: formulas(op, inputs(seed), seed))

    @cache
    def actual(seed: int) -> Results:
        return run_on(backend, op, inputs(seed), seed)

    def expected(seed: int) -> Results:
        return known(seed)[0]

    def eager(seed: int) -> Results:
        return known(seed)[1]

    def draws(kind: int, index: int) -> list[Callable[[int], Tensor]]:
        def of(results: Callable[[int], Results]) -> Any:
            return lambda seed: results(seed)[kind][index]

        return [of(results) for results in (actual, expected, eager)]

    leaves, (outputs, gradients) = tensors_in(inputs(0)), actual(0)
    for index, output in enumerate(outputs):
        assert output.dtype == leaves[0].dtype
        assert_parity(*draws(0, index), name=f"output {index}")
    for index, gradient in enumerate(gradients):
        assert gradient.dtype == leaves[index].dtype
        assert_gradient_parity(*draws(1, index), name=f"gradient {index}")


def check_compiles(
    op: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]], backend: str = "triton"
) -> None:
    """Forward and backward compile into one graph, once for all batch sizes.

    Dynamo and AOTAutograd trace it, and the backend is "aot_eager": Inductor cannot optimize opaque
    ops, and cannot generate code for CPU tensors under the interpreter.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3, 7):
        inputs = with_gradients((arguments(n), {}))
        inputs = (tuple(a.detach().to(device_of(backend)).requires_grad_() for a in inputs[0]), {})
        with kernels.backend(backend):
            outputs, gradients = run(compiled, inputs)
            expected, expected_gradients = run(op, inputs)
        for have, want in zip(outputs + gradients, expected + expected_gradients, strict=True):
            assert torch.equal(have, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def check_registration(op: str, backend: str, *args: Any) -> None:
    """Run PyTorch's own checks of an op on a backend: schema, fake tensors, autograd,
    functionalization."""
    with kernels.backend(backend), recording(op) as ran:
        torch.library.opcheck(kernels.OPS[op].known, args)
    assert set(ran) == {backend}


def check_gradients(function: Callable[..., Any], *arguments: Tensor) -> None:
    """Run `gradcheck` in fp32, where central differences at 1e-2 are accurate to about 1e-3."""
    leaves = tuple(a.to(device_of("triton")).requires_grad_() for a in arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input #", UserWarning)  # gradcheck recommends fp64
        assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=1e-2, rtol=1e-2)


def in_turn(rows: Sequence[Case], first: int = 0) -> list[tuple[Case, torch.dtype]]:
    """(case, dtype) pairs for parametrize. On a GPU, every row is run in every dtype.

    Without one, kernels are interpreted or emulated and a row takes up to a second, so each row
    gets one dtype, in rotation starting at `first`. Rows in `EVERY_DTYPE` always get all three.
    """
    pairs = []
    for index, case in enumerate(rows, first):
        turn = DTYPES[index % len(DTYPES)]
        whole = torch.cuda.is_available() or case.name in EVERY_DTYPE
        pairs += [(case, dtype) for dtype in (DTYPES if whole else (turn,))]
    return pairs


def parity_rows(rows: Sequence[Case], backends: Sequence[Any] = BACKENDS) -> list[Any]:
    """(case, dtype, backend) for parametrize: every dtype of every row; `in_turn` for Triton."""
    every, turns = [(case, dtype) for case in rows for dtype in DTYPES], in_turn(rows)
    return [
        pytest.param(case, dtype, name, id=f"{case}-{dtype}-{name}", marks=marks)
        for name, marks in (_name_and_marks(backend) for backend in backends)
        for case, dtype in (turns if name == "triton" else every)
    ]


def _name_and_marks(backend: Any) -> tuple[str, Any]:
    return (backend, ()) if isinstance(backend, str) else (backend.values[0], backend.marks)


def check_draws(check_one: Callable[[st.DataObject], None], backend: str, examples: int) -> None:
    """Run a check on `examples` random examples. Triton's interpreter gets fewer, and reports a
    failing example without shrinking it, which would take minutes."""
    options: dict[str, Any] = {"max_examples": examples, "deadline": None, "derandomize": True}
    if backend == "triton" and _triton.INTERPRETED:
        options |= {"max_examples": INTERPRETED_DRAWS, "phases": (Phase.generate,)}
    settings(**options)(given(st.data())(check_one))()


# The cases

EVERY_DTYPE = frozenset({
    "tiny-eps", "eps", "mean-100", "mean-100-channels-last", "wide-mean-100", "near-overflow",
    "constant", "tails", "hidden", "peaked", "below", "long", "vae-512-tail",
})  # fmt: skip
"""Cases that depend on the range or precision of a dtype, and attention with several tiles of both
queries and keys."""


def norm_case(
    name: str,
    reason: str,
    shape: Sequence[int],
    groups: int,
    *,
    affine: bool = True,
    film: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    mean: float = 0.3,
    std: float = 1.0,
    add: str = "",
    **options: Any,
) -> Case:
    """A case for `group_norm_silu`, or for `add_group_norm_silu` if `add` names any of "channel",
    "vector", "residual"."""

    def build(draw: Draw) -> Inputs:
        x = layout(draw(*shape, mean=mean, std=std))
        n, c = x.shape[:2]
        weight, bias = (draw(c, mean=1.0), draw(c)) if affine else (None, None)
        kwargs = dict(options)
        if film:
            kwargs["scale_shift"] = draw(n, 2 * c)
        if "channel" in add:
            kwargs["channel_add"] = draw(n, c)
        if "vector" in add:
            kwargs["channel_add"] = draw(c)
        if "residual" in add:
            kwargs["residual"] = layout(draw(*shape))
        return (x, groups, weight, bias), kwargs

    return Case(name, reason, build)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def channels_last_3d(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


GROUP_NORM_SILU = [
    norm_case("sd-320", "SD 1.x first level: 10 channels a group", (1, 320, 8, 8), 32),
    norm_case("sd-1280", "SD 1.x middle: the widest residual block", (1, 1280, 4, 4), 32),
    norm_case("sd-skip-1920", "SD 1.x decoder, after the skip joins", (1, 1920, 4, 4), 32),
    norm_case(
        "sd-transformer",
        "SpatialTransformer's norm: 1e-6 and no activation",
        (2, 320, 8, 8),
        32,
        eps=1e-6,
        activation="none",
        layout=channels_last,
    ),
    norm_case("vae-128", "KL-f8 last level", (1, 128, 32, 32), 32, eps=1e-6, layout=channels_last),
    norm_case("ldm-224", "LDM-4 FFHQ: 7 channels a group", (1, 224, 8, 8), 32),
    norm_case("adm-film", "ADM: scale and shift after the norm", (2, 256, 8, 8), 32, film=True),
    norm_case(
        "adm-film-channels-last",
        "as above, NHWC",
        (3, 64, 8, 8),
        32,
        film=True,
        layout=channels_last,
    ),
    norm_case("digits-32", "the shipped digits model", (4, 32, 8, 8), 32),
    norm_case(
        "tiny-eps", "input of std 0.01: a wrong eps shows", (2, 32, 4, 4), 8, std=1e-2, mean=0
    ),
    norm_case("no-affine", "weight and bias are optional", (2, 24, 5, 3), 8, affine=False),
    norm_case("odd", "no size is a power of two", (3, 21, 5, 7), 7),
    norm_case("odd-channels-last", "the same in NHWC", (3, 21, 5, 7), 7, layout=channels_last),
    norm_case("one-group", "G = 1 is LayerNorm over C, H, W", (2, 6, 5, 5), 1),
    norm_case("instance", "G = C is InstanceNorm", (2, 6, 5, 5), 6),
    norm_case("no-space", "(N, C): a norm of vectors", (5, 48), 6),
    norm_case("sequence", "(N, C, L): 1-D attention blocks", (2, 24, 17), 8),
    norm_case("video", "(N, C, T, H, W) in NDHWC", (1, 12, 3, 4, 5), 4, layout=channels_last_3d),
    norm_case(
        "sliced", "a view: every other column", (2, 16, 6, 10), 4, layout=lambda x: x[..., ::2]
    ),
    norm_case("half", "channels of a wider tensor", (2, 32, 6, 6), 4, layout=lambda x: x[:, :16]),
    norm_case("transposed", "W and H swapped by a view", (2, 16, 6, 5), 4, layout=lambda x: x.mT),
    norm_case(
        "mean-100", "E[x^2] - E[x]^2 loses every digit", (2, 32, 8, 8), 8, mean=100, std=0.01
    ),
    norm_case(
        "mean-100-channels-last",
        "PyTorch's NHWC kernel on a CPU is wrong by 20 here",
        (2, 32, 8, 8),
        8,
        mean=100,
        std=0.01,
        layout=channels_last,
    ),
    norm_case(
        "near-overflow", "fp16 squares overflow from 256 on", (2, 32, 4, 4), 8, mean=2e4, std=1e4
    ),
    norm_case("constant", "variance 0: only eps is left", (2, 8, 4, 4), 4, std=0.0, mean=3.0),
    norm_case("empty-batch", "nothing to do", (0, 8, 4, 4), 4),
    norm_case("empty-space", "nothing to do", (2, 8, 0, 4), 4),
]

ADD_GROUP_NORM_SILU = [
    norm_case("block", "bias + time embedding, SD 1.x", (2, 320, 8, 8), 32, add="channel"),
    norm_case("bias", "a convolution's bias alone, (C,)", (2, 64, 8, 8), 32, add="vector"),
    norm_case(
        "residual", "skip connection", (2, 64, 8, 8), 32, add="residual", layout=channels_last
    ),
    norm_case("all", "everything, with FiLM", (3, 21, 5, 7), 7, add="channel residual", film=True),
    norm_case("nothing", "no addend: total is x", (2, 24, 5, 3), 8),
    norm_case("sequence", "(N, C, L)", (2, 24, 17), 8, add="vector residual"),
    norm_case("no-space", "(N, C)", (5, 48), 6, add="channel residual", activation="none"),
    norm_case("sliced", "views", (2, 16, 6, 10), 4, add="residual", layout=lambda x: x[..., ::2]),
    norm_case("near-overflow", "2e4 + 0.3", (2, 32, 4, 4), 8, mean=2e4, std=1e4, add="residual"),
    norm_case("empty-batch", "nothing to do", (0, 8, 4, 4), 4, add="channel residual"),
]


def attention_case(
    name: str,
    reason: str,
    shape: tuple[int, int, int, int, int],
    *,
    packed: bool = False,
    heads_first: bool = False,
    mask: Callable[[Draw, tuple[int, int, int, int]], Tensor] | None = None,
    extra: int = 0,
    turned: bool = False,
    own_strides: bool = False,
    sliced: bool = False,
    shared: bool = False,
    odd_start: bool = False,
    below: float = 0.0,
    std: float = 1.0,
    values: tuple[float, float] | None = None,
    scale: float | None = None,
) -> Case:
    """A case for `attention`. `shape` is (N, L, S, H, D), `extra` is the number of extra keys, and
    `values` is the mean and std of v."""
    n, length, keys, heads, dim = shape

    def build(draw: Draw) -> Inputs:
        if packed:
            q, k, v = draw(n, length, 3, heads, dim, std=std).unbind(2)
        elif heads_first:
            q, k, v = (draw(n, heads, s, dim).transpose(1, 2) for s in (length, keys, keys))
        else:
            q, k, v = (draw(n, s, heads, dim, std=std) for s in (length, keys, keys))
        if below:
            q, k = q - below, k + below
        if own_strides:
            k = draw(n, keys, 2, heads, dim)[:, :, 1]
            v = draw(n, heads, keys, dim).transpose(1, 2)
        if sliced:
            q, k, v = (F.pad(t, (0, 3))[..., :dim] for t in (q, k, v))
        if values:
            v = draw(n, keys, heads, dim, mean=values[0], std=values[1])
        if shared:  # one text for the whole batch
            k, v = (t[:1].expand(n, -1, -1, -1) for t in (k, v))
        if odd_start:  # rows are a multiple of 16 bytes apart, but none starts on one
            q, k, v = (F.pad(t.flatten(), (1, 0))[1:].view(t.shape) for t in (q, k, v))
        if turned:  # the head dim is not contiguous
            q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
        kwargs: dict[str, Any] = {"scale": scale}
        if extra:
            kwargs["extra_k"] = draw(n, extra, 2, heads, dim, std=std)[:, :, 0]
            kwargs["extra_v"] = draw(n, extra, heads, dim, std=std)
        if mask is not None:
            kwargs["mask"] = mask(draw, (n, heads, length, keys + extra))
        return (q, k, v), kwargs

    return Case(name, reason, build)


def causal(draw: Draw, full: tuple[int, int, int, int]) -> Tensor:
    return torch.ones(full[2:], dtype=torch.bool, device=draw.device).tril()


def padding(draw: Draw, full: tuple[int, int, int, int]) -> Tensor:
    """Sample i sees its first i + 1 keys."""
    seen = torch.arange(full[3]) <= torch.arange(full[0])[:, None]
    return seen[:, None, None].to(draw.device)


def additive(draw: Draw, full: tuple[int, int, int, int]) -> Tensor:
    return draw(1, *full[1:])


def additive_per_sample(draw: Draw, full: tuple[int, int, int, int]) -> Tensor:
    return draw(full[0], 1, full[2], full[3])


def half_hidden(draw: Draw, full: tuple[int, int, int, int]) -> Tensor:
    """Additive, with some -inf and one query that sees no key."""
    mask = draw(*full[2:])
    mask[:, ::3] = float("-inf")
    mask[1] = float("-inf")
    return mask


def bias_of_any_strides(draw: Draw, full: tuple[int, int, int, int]) -> Tensor:
    return draw(*reversed(full)).permute(3, 2, 1, 0)


def per_head(draw: Draw, full: tuple[int, int, int, int]) -> Tensor:
    return draw(full[1], 1, full[3])


def seen_of_any_strides(draw: Draw, full: tuple[int, int, int, int]) -> Tensor:
    return draw(*reversed(full)).permute(3, 2, 1, 0) > 0


HEAD_DIMS = [*range(8, 168, 8), 176, 192, 208, 256]
"""Each is split into different pieces. 512 has its own case below."""

ATTENTION = [
    attention_case("sd-40", "SD 1.x first level, self", (1, 64, 64, 2, 40), packed=True),
    attention_case("sd-40-text", "SD 1.x first level, 77 tokens of text", (1, 64, 77, 2, 40)),
    attention_case("sd-80", "SD 1.x second level", (1, 48, 48, 2, 80), packed=True),
    attention_case("sd-160", "SD 1.x third level", (1, 16, 16, 2, 160), packed=True),
    attention_case("sd2-64", "SD 2.x, SDXL, ADM", (1, 48, 77, 3, 64)),
    attention_case("vae-512", "the VAE's middle: one head of 512", (1, 64, 64, 1, 512)),
    attention_case("vae-512-tail", "several tiles, the last one partial", (1, 70, 50, 1, 512)),
    attention_case("ddpm-256", "DDPM CIFAR-10: one head of 256", (2, 16, 16, 1, 256)),
    attention_case("cin-384", "cin256-v2: one head of 384", (1, 16, 1, 1, 384)),
    attention_case("dit-72", "DiT-XL, U-ViT-H: 72", (1, 32, 32, 2, 72), packed=True),
    attention_case("odd", "no power of two, not even", (3, 13, 29, 3, 7)),
    attention_case("long", "several tiles of queries and of keys", (1, 150, 400, 1, 24)),
    attention_case(
        "long-bias",
        "an additive mask with different values in every block of keys; its gradient needs the "
        "output in fp32, as eager PyTorch keeps it",
        (1, 44, 170, 1, 8),
        mask=additive_per_sample,
    ),
    attention_case("text-154", "two prompts of 77", (2, 33, 154, 2, 40)),
    attention_case("text-333", "SD 3: 256 + 77 keys", (1, 33, 333, 2, 64)),
    attention_case("on-chip-64", "keys that fill their tiles", (1, 70, 64, 2, 64)),
    attention_case("glide", "text and image keys", (2, 24, 24, 2, 64), packed=True, extra=77),
    attention_case("extra-mask", "covers all keys", (2, 9, 7, 2, 16), extra=5, mask=additive),
    attention_case("extra-padding", "covers all keys", (2, 9, 7, 2, 16), extra=5, mask=padding),
    attention_case("extra-blocks", "share a block with others", (1, 45, 150, 2, 24), extra=180),
    attention_case("only-extra", "extra keys but no others", (2, 9, 0, 2, 16), extra=5),
    attention_case("strides", "different for q, k and v", (2, 9, 11, 2, 24), own_strides=True),
    attention_case("sliced", "rows without alignment", (2, 9, 11, 2, 24), sliced=True),
    attention_case("turned", "the head dim is not contiguous", (2, 9, 11, 2, 24), turned=True),
    attention_case("one-key", "softmax of one number", (2, 5, 1, 2, 8)),
    attention_case("one-query", "decoding", (2, 1, 19, 2, 8)),
    attention_case(
        "heads-first", "(N, H, L, D) seen as (N, L, H, D)", (2, 9, 12, 3, 16), heads_first=True
    ),
    attention_case("causal", "a text encoder", (2, 17, 17, 2, 16), mask=causal),
    attention_case("padding", "prompts of several lengths", (3, 6, 9, 2, 16), mask=padding),
    attention_case("additive", "a learned position bias", (2, 7, 9, 3, 16), mask=additive),
    attention_case("bias", "one per sample", (2, 7, 9, 3, 16), mask=additive_per_sample),
    attention_case("own-bias", "one per score", (2, 7, 9, 3, 16), mask=bias_of_any_strides),
    attention_case("own-mask", "one per score", (2, 7, 9, 3, 16), mask=seen_of_any_strides),
    attention_case("head-bias", "the same for all queries", (2, 7, 9, 3, 16), mask=per_head),
    attention_case("one-key-bias", "no gradient", (2, 5, 1, 2, 8), mask=additive_per_sample),
    attention_case("shared-text", "one for the batch: stride 0", (3, 9, 7, 2, 16), shared=True),
    attention_case("odd-start", "rows not 16-byte aligned", (2, 9, 11, 2, 24), odd_start=True),
    attention_case("hidden", "-inf in an additive mask", (2, 7, 9, 3, 16), mask=half_hidden),
    attention_case("scale", "an explicit scale", (2, 7, 9, 3, 16), scale=0.7),
    attention_case("all-alike", "a scale of 0: the mean of v", (2, 7, 9, 3, 16), scale=0.0),
    attention_case("turned-round", "a negative scale", (2, 7, 9, 3, 16), scale=-0.7),
    attention_case("peaked", "scores of a few hundred: exp overflows", (1, 16, 16, 2, 64), std=8.0),
    attention_case(
        "below", "scores of -600: padding keys must not score 0", (1, 16, 19, 2, 64), below=8.0
    ),
    attention_case(
        "near-overflow", "values of 2e4: sums overflow fp16", (1, 16, 19, 2, 64), values=(2e4, 1e4)
    ),
    # around 100, bf16 numbers are 0.5 apart: a smaller deviation would be rounded away
    attention_case("mean-100", "values of 100 +- 1", (1, 16, 19, 2, 64), values=(100, 1.0)),
    attention_case("empty-batch", "nothing to do", (0, 4, 4, 2, 8)),
    attention_case("empty-keys", "nothing to see: zeros", (2, 4, 0, 2, 8)),
    attention_case("empty-queries", "nothing to do", (2, 0, 4, 2, 8)),
    *(
        attention_case(f"dim-{d}", "split in its own way", (1, 21, 19, 2, d), packed=False)
        for d in HEAD_DIMS
    ),
]

GEGLU = [
    Case("sd-320", "SD 1.x first level: 320 -> 2 x 1280", lambda d: ((d(2, 16, 2560),), {})),
    Case("odd", "no size is a power of two", lambda d: ((d(3, 5, 2 * 37),), {})),
    Case("vector", "one row", lambda d: ((d(10),), {})),
    Case("strided", "a view: every other row", lambda d: ((d(6, 24)[::2],), {})),
    Case("transposed", "the last dimension is not contiguous", lambda d: ((d(24, 6).mT,), {})),
    Case("tails", "gates where erf is flat", lambda d: ((d(4, 64, std=6.0),), {})),
    Case(
        "near-overflow", "products beyond fp16 are infinite", lambda d: ((d(4, 64, std=300.0),), {})
    ),
    Case("empty", "nothing to do", lambda d: ((d(0, 8),), {})),
    Case("no-features", "nothing to do", lambda d: ((d(3, 0),), {})),
]


def layer_norm_case(
    name: str,
    reason: str,
    shape: Sequence[int],
    *,
    affine: bool = True,
    parameters: str = "weight bias",
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    residual: bool = False,
    mean: float = 0.3,
    std: float = 1.0,
    **options: Any,
) -> Case:
    """A case for `layer_norm`, or with `residual` for `add_layer_norm`."""

    def build(draw: Draw) -> Inputs:
        x = layout(draw(*shape, mean=mean, std=std))
        addend = (layout(draw(*shape)),) if residual else ()
        d = x.shape[-1]
        weight = draw(d, mean=1.0) if affine and "weight" in parameters else None
        bias = draw(d) if affine and "bias" in parameters else None
        return (x, *addend, weight, bias), options

    return Case(name, reason, build)


LAYER_NORM = [
    layer_norm_case("sd-320", "SD 1.x first level", (2, 16, 320)),
    layer_norm_case("sd-1280", "SD 1.x third level", (2, 8, 1280)),
    layer_norm_case("dit-1152", "DiT: 1e-6, no affine", (2, 8, 1152), affine=False, eps=1e-6),
    layer_norm_case("sd-640", "SD 1.x second level", (2, 8, 640)),
    layer_norm_case("u-vit-1152", "U-ViT-H: affine, more rows than programs", (2, 70, 1152)),
    layer_norm_case("karlo-2048", "karlo's prior; the width is a power of two", (1, 5, 2048)),
    layer_norm_case("t5-4096", "the widest row of a real model", (1, 3, 4096)),
    layer_norm_case("wide", "wider than registers hold: several tiles", (2, 3, 8200)),
    layer_norm_case(
        "wide-mean-100", "Chan's merge keeps the digits", (2, 8192), mean=100, std=0.01
    ),
    layer_norm_case("odd", "no power of two", (3, 5, 37)),
    layer_norm_case("one-above", "a tile with one number in its last part", (70, 33)),
    layer_norm_case("vector", "one row", (48,)),
    layer_norm_case("sliced", "columns of a wider tensor", (9, 80), layout=lambda x: x[:, 3:43]),
    layer_norm_case("every-other", "columns with a step", (9, 80), layout=lambda x: x[:, ::2]),
    layer_norm_case("weight", "no bias", (6, 40), parameters="weight"),
    layer_norm_case("bias", "no weight", (6, 40), parameters="bias"),
    layer_norm_case("strided", "every other row", (6, 24), layout=lambda x: x[::2]),
    layer_norm_case(
        "transposed", "the last dimension is not contiguous", (24, 6), layout=lambda x: x.mT
    ),
    layer_norm_case("tiny-eps", "a wrong eps shows", (4, 64), mean=0, std=1e-2),
    layer_norm_case("mean-100", "E[x^2] - E[x]^2 loses every digit", (4, 64), mean=100, std=0.01),
    layer_norm_case("near-overflow", "squares overflow fp16", (4, 64), mean=2e4, std=1e4),
    layer_norm_case("empty", "nothing to do", (0, 8)),
]

ADD_LAYER_NORM = [
    layer_norm_case("sd-320", "SD 1.x first level", (2, 16, 320), residual=True),
    layer_norm_case("odd", "no power of two", (3, 5, 37), residual=True, affine=False),
    layer_norm_case("dit-1152", "DiT: 1e-6", (2, 8, 1152), residual=True, affine=False, eps=1e-6),
    layer_norm_case("wide", "wider than registers hold", (2, 3, 8200), residual=True),
    layer_norm_case("weight", "no bias", (6, 40), residual=True, parameters="weight"),
    layer_norm_case("mean-100", "large mean", (4, 64), residual=True, mean=100, std=0.01),
    layer_norm_case("strided", "views", (6, 24), residual=True, layout=lambda x: x[::2]),
    layer_norm_case("near-overflow", "2e4", (4, 64), residual=True, mean=2e4, std=1e4),
    layer_norm_case("empty", "nothing to do", (0, 8), residual=True),
]


def ordinary_inputs(
    op: str, device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    """Small arguments for any op, for tests of how it runs rather than of what it computes.

    `dtype` applies to ops with parity cases; the arguments of the others are fp32.
    """
    draw = Draw(dtype, device, torch.Generator().manual_seed(seed))
    seeds = torch.arange(2, device=device) + seed
    if op == "philox_normal":
        return (seeds, (4, 9, 9)), {"stream": 1}
    if op == "sampler_step":
        c, table = kernels.COLUMNS, torch.zeros(2, len(kernels.COLUMNS))
        row = {c.U: 1.3, c.V: -0.7, c.A: 0.9, c.B: 0.4, c.C1: 0.1, c.S: 0.5, c.P: 0.6, c.W: 3.0}
        for column, value in {**row, c.CLAMP: 2.0, c.RESCALE: 0.7}.items():  # writes slot 0
            table[:, column] = value
        x, f, history = draw(2, 4, 9, 9), draw(4, 4, 9, 9), draw(3, 2, 4, 9, 9)
        index = torch.tensor([1, 0], device=device)
        pair = {"cond": seeds + 2, "uncond": seeds, "log_prob": torch.zeros(2, device=device)}
        return (x, f, history, table.to(device), index, seeds), pair
    rows: list[Case] | None = globals().get(op.upper())
    if rows is not None:
        return rows[0].build(draw)
    bound = inspect.signature(kernels.OPS[op].public).bind(**kernels.OPS[op].example(draw))
    return bound.args, bound.kwargs
