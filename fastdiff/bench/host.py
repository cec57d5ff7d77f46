"""The host cost of one op call: Python, checks and allocations, without running any kernel.

Every launch is replaced as late as possible, so that everything the package does before it counts:

    cpu      the functions of the compiled module run once, and return immediately afterwards
    triton   Triton gets a driver of our own, which launches nothing, and a compiler that makes
             kernels without code: its launch code, from ``kernel[grid]`` to the call of the
             driver, counts as part of the op
    cuda     the C functions called through ctypes become Python functions that do nothing

The unit is one ``torch.add`` of two one-element tensors. Each round times a few calls of the op
between two batches of adds, and divides: whatever slows down the machine affects both. The clock is
the thread's own, which stops while another process has the core.

`counts.py` runs this file by its path in a separate process, optionally with the package of another
checkout on the path. So it imports nothing from `fastdiff.bench`, and from the package little more
than all versions have: ``fastdiff.kernels``, the ops' public functions and the registry ``OPS``.
"""

from __future__ import annotations

import gc
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib import import_module
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("cpu", "triton", "cuda")
MODES = ("inference", "gradient")
"""A call without gradient; a call and its backward pass."""
OLD_EXAMPLES = "fastdiff.cli.doctor"
"""The module with example arguments in older versions, whose ops do not declare any."""
ADDS = 50
"""Adds timed before the op, and again after it."""
BATCH_S = 300e-6
"""Approximate duration of the op's calls in one round."""

REPEATS = 2
"""Calls before any is counted: those that are repeated may be planned."""

Call = Callable[[], Any]
Example = tuple[tuple[Any, ...], dict[str, Any]]


class CannotRun(Exception):
    """The op cannot be measured on the backend; the message says why."""


class Stub:
    """Replaces every launch, and counts them."""

    launches = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.launches += 1


class Library:
    """Replaces the library of CUDA launchers: it has every C function, and they do nothing."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Any:
        def function(*args: Any) -> None:
            self._stub()

        return function  # a new object each time: callers set argtypes and restype on it


@contextmanager
def stubbed(backend: str, stub: Stub) -> Iterator[None]:
    """Inside the block, calls reach `stub` where they would launch a kernel of this backend."""
    from fastdiff import kernels

    if backend == "cpu":
        with _native_stubbed(stub):
            yield
        return
    if backend == "triton":
        with _triton_stubbed(stub), kernels.backend("triton"):
            yield
        return
    cuda = _first_module("fastdiff.kernels.cuda", "fastdiff.kernels._cuda")
    with cuda.using_library(Library(stub)), kernels.backend("cuda"):
        yield


@contextmanager
def _triton_stubbed(stub: Stub) -> Iterator[None]:
    """Give Triton a driver that calls `stub`, and let its kernels run on CPU tensors."""
    emulated = getattr(import_module("fastdiff.kernels.choose"), "EMULATED", None)
    if emulated is None:
        raise CannotRun("this version runs Triton kernels on CPU tensors only in the interpreter")
    jit = import_module("triton.runtime.jit")
    driver, before = _fake_driver(), jit.JITFunction._do_compile
    driver.stub = stub
    import_module("triton.runtime").driver.set_active(driver)
    jit.JITFunction._do_compile = _compiled
    emulated["triton"] = ("cpu",)
    try:
        yield
    finally:
        jit.JITFunction._do_compile = before
        del emulated["triton"]


class FakeDriver:
    """Triton's driver for an H200 that is not there. It has Triton's own launcher, up to the
    function in C that would start the kernel."""

    stub: Callable[..., None]

    def __init__(self) -> None:
        nvidia: Any = import_module("triton.backends.nvidia.driver")
        nvidia.PyKernelArg = lambda nested_tuple, type: (nested_tuple, type)
        nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = range(3)
        self.launcher_cls, self.utils = nvidia.CudaLauncher, self

    def launch(self, *args: Any) -> None:
        self.stub(*args)

    def build_signature_metadata(self, signature: Any) -> Any:
        return tuple(signature)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


@cache
def _fake_driver() -> FakeDriver:
    return FakeDriver()  # one, because Triton keeps kernels and the driver that they were made for


def _compiled(
    function: Any, key: Any, signature: Any, device: int, constants: Any, options: Any,
    attributes: Any, warmup: bool,
) -> Any:  # fmt: skip
    """In place of `JITFunction._do_compile`: a kernel without code."""
    compiled = import_module("triton.compiler.compiler").CompiledKernel
    kernel = object.__new__(compiled)
    kernel.src = function.ASTSource(function, signature, constants, attributes)
    kernel.metadata = SimpleNamespace(
        num_warps=options.num_warps, num_ctas=1, shared=0, launch_cooperative_grid=False,
        launch_pdl=False, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1,
    )  # fmt: skip
    kernel.name, kernel.packed_metadata = function.__name__, (options.num_warps, 1, 0)
    kernel.module = kernel.function = 1
    kernel._run = _fake_driver().launcher_cls(kernel.src, kernel.metadata)
    function.device_caches[device][0][key] = kernel
    return kernel


@contextmanager
def _native_stubbed(stub: Stub) -> Iterator[None]:
    try:
        native = import_module("fastdiff.kernels._native")
    except ImportError as error:
        raise CannotRun(f"the compiled module failed to load: {error}") from error
    before = {
        name: value
        for name, value in vars(native).items()
        if callable(value) and not name.startswith("__")
    }
    for name, function in before.items():
        setattr(native, name, _replayed(function, stub))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(native, name, value)


def _replayed(function: Callable[..., Any], stub: Stub) -> Callable[..., Any]:
    """Wrap a function to run only once and to return that result from then on."""
    result: list[Any] = []

    def launched(*args: Any) -> Any:
        stub()
        if not result:
            result.append(function(*args))
        return result[0]

    return launched


def _first_module(*names: str) -> ModuleType:
    """The first of these modules that exists in this version of the package."""
    for name in names[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(names[-1])


# What is called


def examples() -> dict[str, Example]:
    """Op -> small arguments for its public function in this version of the package."""
    from fastdiff import kernels

    return {name: _example(name, op) for name, op in kernels.OPS.items()}


def _example(name: str, op: Any) -> Example:
    if hasattr(op, "example"):
        generator = torch.Generator().manual_seed(0)
        return (), op.example(lambda *shape: torch.randn(shape, generator=generator))
    found: Example = import_module(OLD_EXAMPLES).ordinary_call(name, "cpu")
    return found


COMPOSED = "it calls PyTorch's own kernels besides ours, whose launches are not stubbed"


def composed(op: str, backend: str) -> bool:
    """Whether a backend of an op calls PyTorch's products or concatenation."""
    from fastdiff import kernels

    known = kernels.OPS[op].backends.get(backend)
    return known is not None and not getattr(known, "planned", True)


def prepared(op: str, example: Example, mode: str) -> Call:
    """The call to time. Raises CannotRun if the mode needs a gradient and the op has none."""
    from fastdiff import kernels

    function = getattr(kernels, op)
    args, kwargs = example
    if mode == "inference":
        return lambda: function(*args, **kwargs)

    def leaf(a: Any) -> Any:
        wanted = isinstance(a, Tensor) and a.is_floating_point()
        return a.detach().clone().requires_grad_() if wanted else a

    args, kwargs = tuple(map(leaf, args)), {name: leaf(a) for name, a in kwargs.items()}
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]

    def outputs() -> list[Tensor]:
        y = function(*args, **kwargs)
        flat = y if isinstance(y, (tuple, list)) else [y]
        return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]

    if not leaves or not (first := outputs()):
        raise CannotRun("it has no gradient")
    gradients = [torch.ones_like(t) for t in first]
    return lambda: torch.autograd.grad(outputs(), leaves, gradients, allow_unused=True)


class OpCall(NamedTuple):
    """A call of an op without its data."""

    op: str
    arguments: tuple[tuple[str, Any], ...]
    """Names and values; of tensors (shape, strides, dtype)."""

    def example(self) -> Example:
        """Arguments for the public function, on the CPU."""
        from fastdiff import kernels

        parameters = inspect.signature(getattr(kernels, self.op)).parameters
        positional, named = list[Any](), dict[str, Any]()
        for name, value in self.arguments:
            if isinstance(value, tuple):
                shape, strides, dtype = value
                made = torch.empty_strided(shape, strides, dtype=dtype)
            else:
                made = value
            if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
                named[name] = made
            else:
                positional.append(made)
        return tuple(positional), named


def evaluation(job_name: str) -> dict[OpCall, int]:
    """The op calls of one evaluation of a network of `shapes.GPU_JOBS` in bf16, and how often each
    occurs. The embedding and the context are computed outside, as by the engine."""
    from fastdiff import kernels
    from fastdiff.bench import shapes

    job, found = shapes.GPU_JOBS[job_name], dict[OpCall, int]()

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            given = zip(kernels.OPS[name].types, args, strict=False)  # without `keep`, the last
            described = (
                (key, (a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a)
                for key, a in given
            )
            call = OpCall(name, tuple(described))
            found[call] = found.get(call, 0) + 1
            return function(*args)

        return run

    built, inputs = job.build("meta", torch.bfloat16)
    module: Any = built
    with torch.device("meta"), torch.no_grad():
        if hasattr(module, "project_context"):
            emb = module.embed(inputs["t"], inputs.get("y"), inputs.get("added"))
            context = inputs.get("context")
            kvs = None if context is None else module.project_context(context)
            with shapes.wrapped(noted):
                module.body(inputs["x"], emb, kvs)
        else:
            with shapes.wrapped(noted):
                module(**inputs)
    return found


def in_half_precision(example: Example) -> Example:
    """Copy an example with fp16 instead of fp32."""

    def half(a: Any) -> Any:
        return a.half() if isinstance(a, Tensor) and a.dtype is torch.float32 else a

    args, kwargs = example
    return tuple(map(half, args)), {name: half(a) for name, a in kwargs.items()}


class Case:
    """One op on one backend in one mode, with stubbed launches."""

    def __init__(self, op: str, backend: str, mode: str, example: Example) -> None:
        from fastdiff.kernels import BackendError

        self.stub = Stub()
        self.backend, self.mode = backend, mode
        with self._inside():
            try:
                self.call = prepared(op, example, mode)
                self.call()
            except BackendError:  # some kernels support only half precision
                self.call = prepared(op, in_half_precision(example), mode)
            for _ in range(REPEATS):
                self.call()
            self.stub.launches = 0
            self.call()
            self.launches = self.stub.launches
            if not self.launches:
                raise CannotRun("it launched no kernel: another backend ran it")
            start = time.thread_time()
            for _ in range(10):
                self.call()
            self.calls = max(1, round(BATCH_S * 10 / (time.thread_time() - start)))

    @contextmanager
    def _inside(self) -> Iterator[None]:
        no_gradient = torch.inference_mode() if self.mode == "inference" else nullcontext()
        with stubbed(self.backend, self.stub), no_gradient:
            yield

    def functions(self) -> int:
        """How many functions a call calls, in Python and in C: unlike times, the same in each run.

        Stubbed launches count as one each.
        """
        found = [0]

        def counting(frame: Any, event: str, argument: Any) -> None:
            found[0] += event in ("call", "c_call")

        with self._inside():
            call = self.call
            for _ in range(REPEATS):
                call()
            sys.setprofile(counting)
            call()
            sys.setprofile(None)
        return found[0] - 2 - 2 * self.launches  # `call` and setprofile; what stubs do

    def rounds(self, count: int) -> list[float]:
        """The cost of a call in adds, one number per round."""
        found, one = [], torch.ones(1)

        def adds() -> float:
            start = time.thread_time()
            for _ in range(ADDS):
                torch.add(one, one)
            return (time.thread_time() - start) / ADDS

        with self._inside():
            call, calls = self.call, self.calls
            for _ in range(REPEATS):
                call()
            for _ in range(count):
                before = adds()
                start = time.thread_time()
                for _ in range(calls):
                    call()
                taken = (time.thread_time() - start) / calls
                found.append(2 * taken / (before + adds()))
        return found


# The process


class Worker:
    """Answers requests, one line of JSON each."""

    def __init__(self) -> None:
        self.own: dict[str, Example | OpCall] = dict(examples())
        self.given: dict[str, Example] = {}
        """Examples from another worker, preferred over `own`."""
        self.cases: dict[tuple[str, str, str], Case] = {}

    def ops(self) -> list[str]:
        return sorted(self.own)

    def save(self, path: str) -> None:
        """Write the examples to a file, for a worker of another checkout."""

        def known(a: Any) -> Any:  # another version may lack an enum, so save it as an int
            return int(a) if isinstance(a, int) and not isinstance(a, bool) else a

        examples = {op: own for op, own in self.own.items() if not isinstance(own, OpCall)}
        torch.save(
            {
                op: (tuple(map(known, args)), {name: known(a) for name, a in kwargs.items()})
                for op, (args, kwargs) in examples.items()
            },
            path,
        )

    def load(self, path: str) -> None:
        """Use the examples of another worker, so that both make the same calls."""
        self.given = torch.load(path, weights_only=True)

    def open(self, op: str, backend: str, mode: str) -> dict[str, Any]:
        """Prepare a case, and return its launches per call or why it cannot run.

        "own" is true if the op does not accept the other worker's arguments and uses its own.
        """
        if op not in self.own:
            return {"missing": f"this version has no {op}"}
        own, given = self.own[op], self.given.get(op)
        try:
            if isinstance(own, OpCall):
                if composed(own.op, backend):
                    raise CannotRun(COMPOSED)
                case = Case(own.op, backend, mode, own.example())
                return self._kept((op, backend, mode), case)
            if given is not None:
                with suppress(TypeError, ValueError):
                    case = Case(op, backend, mode, given)
                    return self._kept((op, backend, mode), case)
            case = Case(op, backend, mode, own)
            return {**self._kept((op, backend, mode), case), "own": given is not None}
        except CannotRun as error:
            return {"missing": str(error)}
        except Exception as error:  # noqa: BLE001 - returned to the caller, which prints it
            return {"missing": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}

    def _kept(self, key: tuple[str, str, str], case: Case) -> dict[str, Any]:
        self.cases[key] = case
        return {"launches": case.launches, "functions": case.functions(), "own": False}

    def close(self, op: str, backend: str, mode: str) -> None:
        """Free the tensors of a case."""
        del self.cases[op, backend, mode]

    def collect(self, job: str) -> list[int]:
        """Take the op calls of one evaluation of a network as examples "0", "1", ... for `open`.
        Returns how often each occurs."""
        counts = evaluation(job)
        self.given = {}
        self.own = {str(i): example for i, example in enumerate(counts)}
        return list(counts.values())

    def measure(self, op: str, backend: str, mode: str, count: int) -> float:
        """The median of some rounds."""
        return median(self.cases[op, backend, mode].rounds(count))


def main() -> None:
    torch.set_num_threads(1)
    gc.disable()
    worker = Worker()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
