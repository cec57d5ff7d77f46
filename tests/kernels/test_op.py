"""The registration that all ops share: graphs, backward passes and saved tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdiff import kernels
from fastdiff.kernels import BackendError
from fastdiff.kernels.choose import bound_arguments
from fastdiff.kernels.op import MARKS
from tests.kernels import cases

DIFFERENTIABLE = [name for name, op in kernels.OPS.items() if op.differentiable]
pytestmark = cases.needs_native


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def example(name: str, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """An op's example, with its tensors as leaves that require gradients."""

    def leaf(a: Any) -> Any:
        wants = isinstance(a, Tensor) and a.is_floating_point()
        return a.to(dtype).requires_grad_() if wants else a

    return {key: leaf(a) for key, a in kernels.OPS[name].example(draw).items()}


def leaves_of(given: dict[str, Any]) -> list[Tensor]:
    return [a for a in given.values() if isinstance(a, Tensor) and a.requires_grad]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backends whose backward passes ran, in order."""
    seen: list[str] = []

    def noted(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            seen.append(name)
            return backward(*args)

        return run

    before = {name: op.backends for name, op in kernels.OPS.items()}
    for op in kernels.OPS.values():
        op.use(
            {
                name: known
                if known.backward is None
                else replace(known, backward=noted(name, known.backward))
                for name, known in op.backends.items()
            }
        )
    yield seen
    for name, op in kernels.OPS.items():
        op.use(before[name])


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


# Compiled graphs


@pytest.mark.parametrize("name", sorted(kernels.OPS))
def test_a_graph_follows_the_backend_at_run_time(name: str) -> None:
    """A graph compiled under `auto` runs another kernel when forced to, recompiles for the
    reference but not back, and raises like eager for a backend that cannot run."""
    given = kernels.OPS[name].example(draw)
    function = compiled(lambda: getattr(kernels, name)(**given))
    others = [p for p in cases.BACKENDS if p != "reference" and not _skipped(p)]
    with kernels.record_backends() as served:
        function()
    assert served == {name: {"cpu"}}
    assert graphs() == 1
    for backend in [p.values[0] for p in others]:
        with kernels.backend(backend), kernels.record_backends() as served:
            function()
        assert served == {name: {backend}}
    assert graphs() == 1
    with kernels.backend("cuda"), pytest.raises(BackendError, match="it runs on cuda, got tensors"):
        function()
    assert graphs() == 1
    with kernels.backend("reference"), kernels.record_backends() as served:
        function()
    # the graph contains the operations of the reference, if Dynamo can trace them
    if kernels.OPS[name].traceable:
        assert (served, graphs()) == ({}, 2)
    else:
        assert (served, graphs()) == ({name: {"reference"}}, 1)
    before = graphs()
    with kernels.record_backends() as served:
        function()
    assert (served, graphs()) == ({name: {"cpu"}}, before)


def _skipped(parameter: Any) -> bool:
    return any(mark.args and mark.args[0] for mark in getattr(parameter, "marks", ()))


def test_a_graph_of_the_reference_does_not_replace_a_forced_kernel() -> None:
    """`auto` has no kernel for fp64, so the graph contains the reference. Forcing a kernel must
    raise and not run the reference."""
    x = torch.randn(2, 8, dtype=torch.float64)
    function = compiled(kernels.geglu)
    with kernels.record_backends() as served:
        function(x)
    assert served == {}
    with kernels.backend("cpu"), pytest.raises(BackendError, match="got float64"):
        function(x)
    torch.testing.assert_close(function(x), kernels.geglu(x))


def test_a_graph_compiled_under_a_forced_kernel_follows_too() -> None:
    x = torch.randn(2, 8)
    function = compiled(kernels.geglu)
    with kernels.backend("cuda"), pytest.raises(BackendError, match="it runs on cuda"):
        function(x)
    with kernels.record_backends() as served:
        function(x)
    assert served == {"geglu": {"cpu"}}
    assert graphs() == 1


def test_a_thread_has_its_own_backend_in_a_graph() -> None:
    x, seen = torch.randn(2, 8), []
    function = compiled(kernels.geglu)
    function(x)

    def other() -> None:
        with kernels.record_backends() as served:
            function(x)
        seen.append(served)

    with kernels.backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [{"geglu": {"cpu"}}]


def test_the_environment_is_followed_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    function = compiled(kernels.geglu)
    function(x)
    monkeypatch.setenv("FASTDIFF_BACKEND", "cuda")
    with pytest.raises(BackendError, match="it runs on cuda"):
        function(x)


# The backward pass


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_takes_the_forward_passs_backend(name: str, graph: bool, ran: list[str]) -> None:
    """This holds outside the block, in another thread, and under another backend."""
    given = example(name)
    leaves = leaves_of(given)

    def call(*leaves: Tensor) -> Tensor:
        y = getattr(kernels, name)(**given)
        return sum(o.square().sum() for o in (y if isinstance(y, tuple) else (y,)))

    function = compiled(call) if graph else call
    with kernels.backend("cpu"):
        loss = function(*leaves)
    with kernels.backend("reference"):
        expected = torch.autograd.grad(call(*leaves), leaves)
    found: list[Any] = []

    def differentiate() -> None:
        with kernels.backend("triton"):  # which would raise, or give different bits
            found.append(torch.autograd.grad(loss, leaves))

    thread = threading.Thread(target=differentiate)
    thread.start()
    thread.join()
    assert ran == ["cpu"]
    for have, want in zip(found[0], expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_marked_backend_survives_a_graph(name: str, ran: list[str]) -> None:
    """One graph runs on two backends, and each backward pass uses that of its forward pass."""
    given = example(name)
    leaves = leaves_of(given)

    def call() -> Tensor:
        y = getattr(kernels, name)(**given)
        return sum(o.square().sum() for o in (y if isinstance(y, tuple) else (y,)))

    others = [p.values[0] for p in cases.BACKENDS if p != "reference" and not _skipped(p)]
    function = compiled(call)
    losses = []
    for backend in others:
        with kernels.backend(backend):
            losses.append(function())
    for loss in reversed(losses):
        torch.autograd.grad(loss, leaves)
    assert ran == others[::-1]
    assert graphs() == 1


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_checkpointing_recomputes_on_the_same_backend(name: str, ran: list[str]) -> None:
    given = example(name)
    leaves = leaves_of(given)

    def call(*_: Tensor) -> Tensor:
        y = getattr(kernels, name)(**given)
        return sum(o.square().sum() for o in (y if isinstance(y, tuple) else (y,)))

    with kernels.backend("cpu"), kernels.record_backends() as served:
        plain = torch.autograd.grad(call(), leaves)
        loss = checkpoint(
            call, *leaves, use_reentrant=False, context_fn=kernels.checkpoint_contexts
        )
    assert served == {name: {"cpu"}}
    with kernels.backend("reference"), kernels.record_backends() as served:
        found = torch.autograd.grad(loss, leaves)
    assert served == {name: {"cpu"}}  # the recomputed forward pass
    assert ran == ["cpu", "cpu"]
    assert all(map(torch.equal, found, plain))


def test_hooks_on_saved_tensors_keep_the_backend_or_use_the_reference(ran: list[str]) -> None:
    """A hook that copies saved tensors changes the strides of the mark, which tell the backend;
    eager needs no mark."""
    given = example("group_norm_silu")
    leaves, args = leaves_of(given), bound_arguments("group_norm_silu", (), given)
    copied = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().numpy().copy(), torch.from_numpy
    )
    with kernels.backend("cpu"):
        expected = torch.autograd.grad(kernels.group_norm_silu(**given).square().sum(), leaves)
        with copied:
            eager = kernels.group_norm_silu(**given).square().sum()
            registered = kernels.OPS["group_norm_silu"].known(*args)[0].square().sum()
    found = [torch.autograd.grad(loss, leaves) for loss in (eager, registered)]
    assert ran == ["cpu", "cpu", "reference"]
    assert all(map(torch.equal, found[0], expected))
    for have, want in zip(found[1], expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_eager_and_registered_gradients_are_the_same_bits(name: str) -> None:
    """This also holds if only one output is used."""
    given = example(name)
    leaves, args, op = leaves_of(given), bound_arguments(name, (), given), kernels.OPS[name]
    with kernels.backend("cpu"):
        pair = [getattr(kernels, name)(**given), op.known(*args)]
    eager, registered = (_tensors(outputs)[: op.outputs] for outputs in pair)
    for chosen in (eager, registered):
        assert [o.requires_grad for o in chosen] == [True] * op.outputs
    for used in ([0], [op.outputs - 1], list(range(op.outputs))):
        losses = [sum(outputs[i].sin().sum() for i in used) for outputs in (eager, registered)]
        mine, theirs = (
            torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
            for loss in losses
        )
        for have, want in zip(mine, theirs, strict=True):
            assert (have is None) == (want is None)
            assert have is None or torch.equal(have, want)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batched_gradients(name: str) -> None:
    """`is_grads_batched` runs an eager backward pass under vmap, where kernels cannot run."""
    given = example(name)
    leaves = leaves_of(given)
    with kernels.backend("cpu"):
        y = _tensors(getattr(kernels, name)(**given))[0]
    dys = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(
        y, leaves, dys, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    single = [
        torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True) for dy in dys
    ]
    for have, *rows in zip(found, *single, strict=True):
        assert all(map(torch.equal, have, rows))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # when PyTorch makes fake tensors
def test_compiled_autograd_traces_a_backward_pass_of_eager() -> None:
    x = draw(2, 8).requires_grad_()
    (expected,) = torch.autograd.grad(kernels.geglu(x).sin().sum(), x)
    torch._dynamo.reset()
    loss = kernels.geglu(x).sin().sum()
    with torch._dynamo.compiled_autograd._enable(
        lambda graph: torch.compile(graph, backend="aot_eager", fullgraph=True)
    ):
        loss.backward()
    assert torch.equal(x.grad, expected)


# Outputs and saved tensors, and the fake implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(kernels.OPS))
def test_all_backends_return_what_the_fake_says(name: str, dtype: torch.dtype) -> None:
    """Outputs and statistics have the fake's shapes, dtypes and strides, and the mark tells the
    backend that ran."""
    op = kernels.OPS[name]
    given = op.example(draw)
    if op.differentiable:
        given = {k: a.to(dtype) if isinstance(a, Tensor) else a for k, a in given.items()}
    if name in ("group_norm_silu", "add_group_norm_silu"):
        given = {
            k: cases.channels_last(a) if isinstance(a, Tensor) and a.ndim == 4 else a
            for k, a in given.items()
        }
    args = bound_arguments(name, (), given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        expected = _tensors(op.known(*fakes))
    for parameter in cases.BACKENDS:
        backend = parameter if isinstance(parameter, str) else parameter.values[0]
        if _skipped(parameter):
            continue
        fresh = [a.clone() if isinstance(a, Tensor) else a for a in args]
        with kernels.backend(backend):
            found = _tensors(op.known(*fresh))
        assert len(found) == len(expected)
        for have, want in zip(found, expected, strict=True):
            assert (have.shape, have.dtype) == (want.shape, want.dtype)
            if have.numel():
                assert have.stride() == want.stride()
        if op.differentiable:
            assert found[-1].stride() == (MARKS[backend],)


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [] if result is None else [result]


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_registered_right(name: str, backend: str) -> None:
    """PyTorch's own checks pass, also with the reference inside the op."""
    given = example(name)
    cases.check_registration(name, backend, *bound_arguments(name, (), given))


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_of_every_op_on_every_backend(name: str, backend: str) -> None:
    """They agree with those of the fp64 formula."""
    given, wide = example(name), example(name, dtype=torch.float64)

    def twice(function: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
        y = function(**given)
        outputs = y if isinstance(y, tuple) else (y,)
        leaves = leaves_of(given)
        first = torch.autograd.grad([o.sin().sum() for o in outputs], leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    with kernels.backend(backend):
        found = twice(getattr(kernels, name), given)
    for have, want in zip(found, twice(kernels.OPS[name].formula, wide), strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(have.double(), want, rtol=1e-3, atol=1e-4 * max(1.0, scale))


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if "weight" in kernels.OPS[n].types])
def test_an_empty_batch_gives_parameters_zeros(name: str, backend: str) -> None:
    given = example(name)
    for key in kernels.OPS[name].types:
        batched = key in ("x", "skip", "residual", "scale_shift", "channel_add")
        if batched and isinstance(given.get(key), Tensor):
            given[key] = given[key][:0].detach().requires_grad_()
    leaves = leaves_of(given)
    with kernels.backend(backend):
        y = getattr(kernels, name)(**given)
        y = y[0] if isinstance(y, tuple) else y
        found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for gradient, leaf in zip(found, leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


# Other transformations


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_exported_programs_run_the_op(name: str) -> None:
    given = kernels.OPS[name].example(draw)

    class Module(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            return getattr(kernels, name)(**given)

    program = torch.export.export(Module(), (), given)
    targets = [str(node.target) for node in program.graph.nodes]
    assert f"fastdiff.{name}.default" in targets
    with kernels.record_backends() as served:
        found = _tensors(program.module()(**given))
    assert served == {name: {"cpu"}}
    for have, want in zip(found, _tensors(getattr(kernels, name)(**given)), strict=True):
        assert torch.equal(have, want)


def test_vmap_uses_the_reference_and_a_forced_kernel_raises() -> None:
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(torch.vmap(kernels.geglu)(x), kernels.geglu(x))
    refused = pytest.raises(BackendError, match=r"cannot run geglu under torch\.func")
    with kernels.backend("cpu"), refused:
        torch.vmap(kernels.geglu)(x)


def test_a_tensor_on_another_device_is_an_error_that_names_it() -> None:
    """The op itself checks this, since a kernel would use the address on the wrong device."""
    x, weight = torch.randn(2, 8), torch.empty(8, device="meta")
    refused = pytest.raises(ValueError, match="weight must be on the device of x, cpu, got meta")
    with kernels.backend("cpu"), refused:
        kernels.OPS["layer_norm"]._run(x, weight, None, 1e-5)
