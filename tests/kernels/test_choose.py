"""The choice of a backend: order, forcing, reasons, warnings, threads, and calls that skip
PyTorch's dispatcher."""

from __future__ import annotations

import asyncio
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import kernels
from fastdiff.kernels import Backend, BackendError, BackendWarning, choose
from tests.kernels.cases import ordinary_inputs, recording

X = torch.randn(2, 8)


class Probe:
    """A fake op whose backends return their names. It is not registered with PyTorch."""

    name = "probe"
    public: Any = None
    preferred: str | None = None

    def __init__(self) -> None:
        self.candidates: dict[Any, Any] = {}
        self.use({"reference": backend("reference")})

    def use(self, backends: dict[str, Backend]) -> None:
        self.backends = backends
        self.candidates.clear()

    def first(self, args: tuple[Any, ...]) -> str | None:
        return self.preferred

    def reference(self, x: torch.Tensor) -> str:
        return "reference"

    def arguments(self, *args: Any) -> tuple[Any, ...]:
        return args

    def __call__(self, x: torch.Tensor) -> str:
        return choose.choose(self, (x,)).forward(x, False)[0]

    def add(self, name: str, reason: str | None = None, **options: Any) -> None:
        added = {**self.backends, name: backend(name, lambda x: reason, **options)}
        self.use({name: added[name] for name in choose.ORDER if name in added})

    def missing(self, name: str) -> str:
        return choose.missing(self, name)


def backend(name: str, why_not: Any = None, **options: Any) -> Backend:
    return Backend(name=name, forward=lambda x, keep: (name, None), why_not=why_not, **options)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Probe]:
    """The fake op, with every backend allowed on the CPU."""
    monkeypatch.setattr(choose, "DEVICES", dict.fromkeys(choose.ORDER, ()))
    monkeypatch.setattr(choose, "UNAVAILABLE", {})
    new = choose.OPS["probe"] = Probe()
    yield new
    del choose.OPS["probe"]
    choose._warned.clear()


def test_a_backend_for_other_dtypes_is_passed_in_silence(op: Probe) -> None:
    op.add("cpu", dtypes=(torch.float32, torch.half))
    assert (op(X), op(X.half()), op(X.double())) == ("cpu", "cpu", "reference")
    explained = str(kernels.explain("probe", X.double()))
    assert "it supports float32, float16, got float64" in explained
    with kernels.backend("cpu"), pytest.raises(BackendError, match="got float64"):
        op(X.double())


def test_auto_begins_with_what_the_op_prefers(op: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, since measurements exist only for GPUs."""
    for name in ("cpu", "triton", "cuda"):
        op.add(name)
    meta = torch.empty(2, 8, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", property(lambda x: torch.device("cuda", 0)))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda x: False))
    assert op(meta) == "cuda"
    op.preferred = "triton"
    assert op(meta) == "triton"
    order = [each.name for each in choose.candidates(op, (meta,))]
    assert order == ["triton", "cuda", "cpu", "reference"]
    op.add("triton", "no such shape")
    with pytest.warns(BackendWarning, match="no such shape"):
        assert op(meta) == "cuda"
    op.preferred = "unknown"  # a file from another build may contain this
    assert op(meta) == "cuda"
    with kernels.backend("cpu"):
        assert op(meta) == "cpu"


def test_shape_classes_of_what_is_measured() -> None:
    x = torch.empty(1, 320, 64, 64, dtype=torch.bfloat16, device="meta")

    def of(op: str, *args: Any) -> str:
        return str(kernels.OPS[op].shape_class(*args))

    assert of("group_norm_silu", x, 32) == "nchw/cache"  # 2.6 MB
    nhwc = x.to(memory_format=torch.channels_last)
    assert of("add_group_norm_silu", nhwc, 32, None, None, None, nhwc) == "nhwc/cache"
    assert of("geglu", x[:, :32]) == "launch"
    assert of("layer_norm", x.expand(16, -1, -1, -1)) == "memory"
    q = torch.empty(2, 4096, 8, 40, device="meta")
    assert of("attention", q, q, q) == "self/40"
    assert of("attention", q, q[:, :77], q[:, :77]) == "context/40"


def test_auto_takes_the_first_without_an_objection(op: Probe) -> None:
    assert op(X) == "reference"
    op.add("cpu")
    assert op(X) == "cpu"
    op.add("library")
    assert op(X) == "library"
    op.add("triton")
    op.add("cuda")
    assert op(X) == "cuda"
    assert tuple(op.backends) == choose.ORDER


def test_a_fallback_warns_once_per_reason(op: Probe) -> None:
    def public(x: torch.Tensor) -> str:
        return op(x)

    op.add("triton", "D must be at most 4, got 8")
    with pytest.warns(
        BackendWarning, match=r"probe: triton .* D must be at most 4, got 8"
    ) as caught:
        assert public(X) == "reference"
    assert caught[0].filename == __file__  # the caller of the public function
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert public(X) == "reference"
    op.add("triton", "another reason")
    with pytest.warns(BackendWarning, match="another reason"):
        public(X)
    choose._warned.remove(("probe", "another reason"))
    choose._warned.add(("other", "another reason"))
    with pytest.warns(BackendWarning, match="another reason"):  # each op warns
        public(X)


def test_a_backend_for_another_device_is_passed_in_silence(op: Probe) -> None:
    choose.DEVICES["cuda"] = ("cuda",)
    op.add("cuda")
    assert op(X) == "reference"
    assert "runs on cuda, got tensors on cpu" in str(kernels.explain("probe", X))
    with kernels.backend("cuda"), pytest.raises(BackendError, match="it runs on cuda, got"):
        op(X)


def test_auto_passes_a_slower_implementation_in_silence(op: Probe) -> None:
    reason = "it is slower than the reference above 4 numbers"
    op.add("cpu", slower=lambda x: reason if x.numel() > 4 else None)
    assert (op(X), op(X[:1, :4])) == ("reference", "cpu")  # a warning would be an error
    explained = kernels.explain("probe", X)
    assert explained.chosen == "reference"
    assert explained.reasons["cpu"] == reason
    with kernels.backend("cpu"):
        assert op(X) == "cpu"
        assert kernels.explain("probe", X).reasons["cpu"] is None


def test_a_forced_backend_runs_or_raises_with_each_reason(op: Probe) -> None:
    op.add("triton", "D must be at most 4, got 8")
    op.add("cpu")
    with kernels.backend("reference"):
        assert op(X) == "reference"
    with kernels.backend("triton"), pytest.raises(BackendError) as caught:
        op(X)
    assert caught.value.reasons == {
        "cuda": op.missing("cuda"),
        "triton": "D must be at most 4, got 8",
        "cpu": None,
        "reference": None,
    }
    assert "D must be at most 4, got 8" in str(caught.value)
    assert "use backend='auto'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_op_says_what_is_missing(op: Probe) -> None:
    missing = "probe has no triton backend"
    with kernels.backend("triton"), pytest.raises(BackendError, match=missing):
        op(X)


def test_contexts_nest_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDIFF_BACKEND", raising=False)
    assert kernels.selected_backend() == "auto"
    with kernels.backend("triton"):
        with kernels.backend("auto"):
            assert kernels.selected_backend() == "auto"
        assert kernels.selected_backend() == "triton"
        with pytest.raises(KeyError), kernels.backend("cpu"):
            raise KeyError
        assert kernels.selected_backend() == "triton"
    assert kernels.selected_backend() == "auto"
    assert fastdiff.backend is kernels.backend


def test_the_environment_is_read_at_call_time(op: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    op.add("cpu")
    monkeypatch.setenv("FASTDIFF_BACKEND", "reference")
    assert op(X) == "reference"
    with kernels.backend("cpu"):
        assert op(X) == "cpu"
    monkeypatch.setenv("FASTDIFF_BACKEND", "")
    assert op(X) == "cpu"
    monkeypatch.setenv("FASTDIFF_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"FASTDIFF_BACKEND must be one of .* got 'gpu'"):
        op(X)


def test_threads_do_not_see_each_other(op: Probe) -> None:
    op.add("cpu")
    inside, seen = threading.Event(), []

    def other() -> None:
        inside.wait(10)
        seen.append(op(X))

    thread = threading.Thread(target=other)
    thread.start()
    with kernels.backend("reference"):
        inside.set()
        thread.join()
        assert op(X) == "reference"
    assert seen == ["cpu"]


def test_tasks_do_not_see_each_other() -> None:
    async def task(name: str) -> str:
        with kernels.backend(name):
            await asyncio.sleep(0)
            return kernels.selected_backend()

    async def both() -> list[str]:
        return await asyncio.gather(task("cpu"), task("triton"))

    before = choose.traced_choice()
    assert asyncio.run(both()) == ["cpu", "triton"]
    assert choose.traced_choice() == before, "graphs see a backend that is no longer forced"


def test_explain_prints_the_choice_and_the_reasons(op: Probe) -> None:
    op.add("triton", "D must be at most 4, got 8")
    op.add("cpu")
    explanation = kernels.explain("probe", X)
    assert (explanation.selected, explanation.chosen) == ("auto", "cpu")
    first, *rest = str(explanation).splitlines()
    assert first == "probe (backend 'auto'): cpu"
    assert [line.split(maxsplit=1)[0] for line in rest] == ["cuda", "triton", "reference"]
    assert rest[1].endswith("D must be at most 4, got 8")
    with kernels.backend("triton"):
        assert kernels.explain("probe", X).chosen is None
        assert "cannot run" in str(kernels.explain("probe", X))


def test_explain_takes_the_public_function() -> None:
    assert kernels.explain(kernels.geglu, X.double()).chosen == "reference"
    assert kernels.explain(kernels.geglu, x=X.double()).chosen == "reference"
    with pytest.raises(ValueError, match="needs the arguments of geglu"):
        kernels.explain("geglu")
    with pytest.raises(ValueError, match=r"explain\('attention'\) takes .* missing .* 'k'"):
        kernels.explain("attention", X)
    with pytest.raises(ValueError, match="geglu: the first argument must be a tensor, got NoneTyp"):
        kernels.explain("geglu", None)
    with pytest.raises(ValueError, match=r"op must be one of .*'attention'.* got 'conv'"):
        kernels.explain("conv", X)


@pytest.mark.parametrize("name", sorted(choose.OPS))
def test_explain_takes_what_the_function_takes(name: str) -> None:
    """Both positional and keyword arguments, with defaults omitted."""
    args, kwargs = ordinary_inputs(name, "cpu")
    function = getattr(kernels, name)
    names = list(inspect.signature(function).parameters)
    by_name = {**dict(zip(names, args, strict=False)), **kwargs}
    expected = kernels.explain(name, *args, **kwargs)
    assert kernels.explain(function, **by_name) == expected
    assert kernels.explain(name, **dict(reversed(by_name.items()))) == expected
    assert expected.chosen is not None


def test_available_lists_every_public_op() -> None:
    table = kernels.available()
    assert set(table) == set(kernels.OPS)
    for name, backends in table.items():
        assert callable(getattr(kernels, name))
        assert backends["reference"] is None
        assert backends["cuda"] == choose.UNAVAILABLE.get("cuda")


def test_record_backends_reports_what_ran() -> None:
    with kernels.record_backends() as served:
        assert served == {}
        kernels.geglu(X.double())
        with kernels.backend("reference"):
            kernels.layer_norm(X)
        kernels.layer_norm(X)
        kernels.layer_norm(X.clone().requires_grad_())
    auto = kernels.explain("layer_norm", X).chosen
    assert served == {"geglu": {"reference"}, "layer_norm": {"reference", auto}}
    kernels.attention(*[X[:, :, None, None]] * 3)
    assert "attention" not in served


def test_unknown_names() -> None:
    with (
        pytest.raises(ValueError, match=r"backend must be one of .* got 'gpu'"),
        kernels.backend("gpu"),
    ):
        pass
    with pytest.raises(ValueError, match="got 'auto'"):
        Backend(name="auto", forward=lambda x, keep: (x, None))


CALLS = {
    "group_norm_silu": lambda x: kernels.group_norm_silu(x, 4, scale_shift=x.flatten(1)[:, :16]),
    "add_group_norm_silu": lambda x: kernels.add_group_norm_silu(x, 4, residual=x)[0],
    "attention": lambda x: kernels.attention(x, x, x),
    "geglu": kernels.geglu,
    "layer_norm": kernels.layer_norm,
    "add_layer_norm": lambda x: kernels.add_layer_norm(x, x)[0],
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CALLS)
def test_no_graph_break(name: str, backend: str) -> None:
    absent = kernels.available()[name][backend]
    if absent is not None:
        pytest.skip(absent)
    torch._dynamo.reset()
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    with kernels.backend(backend), recording(name) as ran:
        actual, expected = compiled(x), CALLS[name](x)
    assert set(ran) == {backend}
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


class Subclass(torch.Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


def test_only_plain_calls_skip_pytorchs_dispatcher() -> None:
    """All other calls go through the registered op. Calls that need gradients are treated alike,
    both forward and backward."""
    op = kernels.OPS["layer_norm"]
    wanted, weight = X.clone().requires_grad_(), torch.ones(8)

    class Seen(Exception):
        pass

    def seen(*args: Any) -> Any:
        raise Seen

    def goes_through(x: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
        before = op.known, op.known_backward
        op.known = op.known_backward = seen
        try:
            y = op(x, weight, None, 1e-5)
            if y.requires_grad:
                y.sum().backward()
        except Seen:
            return True
        finally:
            op.known, op.known_backward = before
        return False

    with kernels.backend("cpu"):
        for x, w in ((X, None), (X, weight), (X, torch.nn.Parameter(weight, False))):
            assert not goes_through(x, w)
        assert not goes_through(wanted)
        assert not goes_through(X, torch.nn.Parameter(weight))
        with Mode():
            assert goes_through(wanted)
        with torch.no_grad():
            assert not goes_through(wanted)
        assert goes_through(X, weight.as_subclass(Subclass))
        assert goes_through(X, weight.to("meta"))
        assert goes_through(torch._neg_view(X))
        with Mode():
            assert goes_through(X)


def test_cached_choices_follow_changes_of_the_backends(op: Probe) -> None:
    assert op(X) == "reference"
    op.add("cpu")
    assert op(X) == "cpu"
    before = op.backends
    with recording("probe") as ran:
        assert op(X) == "cpu"
    assert ran == ["cpu"]
    op.use({"reference": before["reference"]})
    assert op(X) == "reference"
    op.use(before)
    assert op(X) == "cpu"
    choose.UNAVAILABLE["cpu"] = "gone"
    choose.forget_candidates()
    assert op(X) == "reference"
    assert kernels.explain("probe", X).reasons["cpu"] == "gone"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.attention(*[torch.ones(1, 2, 1, 4)] * 3, scale="x"), "scale .*, got 'x'"),
        (lambda: kernels.group_norm_silu(X, 4.0), r"num_groups must be an integer, got 4\.0"),
        (lambda: kernels.add_group_norm_silu(X, "4"), "num_groups must be an integer, got '4'"),
        (lambda: kernels.group_norm_silu(X, 4, eps=None), "eps must be a number, got None"),
        (lambda: kernels.layer_norm(X, eps="1e-5"), "layer_norm: eps .* got '1e-5'"),
        (lambda: kernels.add_layer_norm(X, X, eps=[1]), r"add_layer_norm: eps .* got \[1\]"),
    ],
)
def test_options_that_are_not_numbers(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
