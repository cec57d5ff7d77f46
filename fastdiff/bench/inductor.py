"""Kernels that torch.compile launches in one evaluation of a network, read off its generated code.

    python -m fastdiff.bench.counts inductor
    python -m fastdiff.bench.counts inductor --docs

No GPU is needed. The network's weights are fake tensors on a device "cuda", PyTorch's questions
about the GPU get the answers of an H200, and Inductor is stopped when it has written its code: the
function that a compiled network calls, and the source of every Triton kernel. In that function,

    `triton_....run(...)`               is one launch, and moves what its arguments say: Inductor's
                                        own estimate (`kernel_num_gb`), and an argument that is read
                                        in a second loop (the normalisation behind the sums of a
                                        norm) once more, as launches.py counts it
    `extern_kernels....(...)`           is one launch of cuBLAS or cuDNN
    `torch.ops.aten._scaled_dot_...`    is one launch

Other calls of operators raise an error. What no CPU build of PyTorch can do is left out: patterns
that look for attention written out (these networks call scaled_dot_product_attention, which becomes
the flash kernel, or the memory-efficient one for head dims above 256), padding of matrix products
(which is decided by measuring) and the folding of constants. `max-autotune` chooses other kernels
by measuring, so it cannot be counted; `reduce-overhead` launches the same kernels in a graph.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._triton
from torch import Tensor, nn

from fastdiff.bench import counted

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 10**9,
    L2_cache_size=60 * 2**20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    warp_size=32,
)
"""What PyTorch asks of a GPU."""
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
"""c10::impl::device_guard_impl_registry: of the CPU, of CUDA, and of others."""
WIDEST_FLASH = 256
DTYPES = {"torch.bfloat16": 2, "torch.float16": 2, "torch.float32": 4, "torch.int64": 8}
KINDS = {
    "convolution": "convolution",
    "addmm": "linear",
    "mm": "linear",
    "bmm": "linear",
    "baddbmm": "linear",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
}
"""Function that is no Triton kernel -> the group it belongs to."""
FUSED = "fused"
"""The group of Inductor's own kernels."""


class _Written(Exception):
    """Inductor has written its code."""


@dataclass(kw_only=True)
class Compiled:
    """What one evaluation of a compiled network launches."""

    launches: Counter[str] = field(default_factory=Counter)
    """Group -> launches."""
    bytes: int = 0
    flops: int = 0
    bytes_of: Counter[str] = field(default_factory=Counter)
    """Group -> bytes."""
    flops_of: Counter[str] = field(default_factory=Counter)
    kernels: int = 0
    """Different Triton kernels."""

    @property
    def total(self) -> int:
        return sum(self.launches.values())


# Inductor without a GPU


def on_fake_gpu(module: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A module and its inputs on the meta device, moved to a device "cuda" that does not exist.

    Must be called under a `FakeTensorMode`.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(each) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(moved, value))
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    return module._apply(moved), {name: moved(value) for name, value in inputs.items()}


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's choice on an H200, which a CPU build makes for the CPU."""
    assert attn_mask is None, "the networks counted here have no masks"
    aten: Any = torch.ops.aten
    if q.shape[-1] <= WIDEST_FLASH:
        flash: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
        return flash
    wide: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, None, False, scale=scale)[
        0
    ]
    return wide


def _format_of_cudnn(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    last = torch.channels_last
    given = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    return last if given else torch.contiguous_format


def _lend_guard() -> None:
    """Give the device "cuda" the CPU's guard, which does nothing, if this PyTorch has none for it:
    indexing a fake tensor asks for one."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 2).in_dll(library, GUARDS)
    if not registry[1]:
        registry[1] = registry[0]


@contextlib.contextmanager
def _h200(written: list[str]) -> Iterator[None]:
    """Inside the block, PyTorch believes in an H200, and Inductor's code goes into `written`.

    Much of PyTorch caches what it hears, so a process that did this must do nothing else.
    """
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, graph
    from torch._inductor.fx_passes import joint_graph

    write = graph.GraphLowering.codegen

    def codegen(self: Any) -> Any:
        written.append(write(self)[0].value)
        raise _Written

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H200,
        "get_device_capability": lambda device=None: (H200.major, H200.minor),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    _lend_guard()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for owner, name, value in (
            (CudaInterface, "get_device_properties", staticmethod(lambda device=None: H200)),
            (torch.version, "cuda", "13.0"),
            (torch.utils._triton, "triton_hash_with_backend", lambda: ""),
            (torch._C, "_conv_determine_backend_memory_format", _format_of_cudnn),
            (F, "scaled_dot_product_attention", _attention),
            (joint_graph, "lazy_init", lambda device=None: None),
            (graph.GraphLowering, "codegen", codegen),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(
            config.patch(
                shape_padding=False,
                joint_graph_constant_folding=False,
                graph_partition=False,
                benchmark_kernel=True,  # writes the bytes of each kernel into its source
                force_disable_caches=True,
                compile_threads=1,
            )
        )
        yield


def code_of(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]], *, default_device: bool = True
) -> str:
    """The code that torch.compile generates for an H200.

    Args:
        make: returns a module and its inputs by name, on the meta device.
        default_device: whether tensors that the module creates without naming a device are on the
            GPU, as diffusers' are. Dynamo cannot trace `Tensor.unflatten` then, which ours call.

    Raises:
        torch._dynamo.exc.TorchDynamoException: the network cannot be compiled as a whole.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    module, inputs = make()
    written: list[str] = []
    with _h200(written), FakeTensorMode(), torch.no_grad():
        module, inputs = on_fake_gpu(module.requires_grad_(False), inputs)
        compiled = torch.compile(module, dynamic=False, fullgraph=True)
        try:
            with torch.device("cuda") if default_device else contextlib.nullcontext():
                compiled(**inputs)
        except Exception:
            if not written:
                raise
    [code] = written
    return code


# Its code


@dataclass(frozen=True)
class _Buffer:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        sizes = zip(self.shape, self.strides, strict=True)
        return DTYPES[self.dtype] * math.prod(size for size, step in sizes if step)


def read(code: str) -> Compiled:
    """Count the launches in generated code, their bytes, and the FLOPs of products."""
    tree = ast.parse(code)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    kernels = dict(_kernels(tree))
    reader = _Reader(kernels, _arguments(functions["get_args"]))
    for statement in ast.walk(functions["call"]):
        if isinstance(statement, ast.With):
            for inner in statement.body:
                reader.statement(inner)
    reader.found.kernels = len(kernels)
    return reader.found


def _kernels(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and bytes of each Triton kernel."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "async_compile.triton"
        ):
            name, source = (ast.literal_eval(argument) for argument in node.value.args[:2])
            yield name, kernel_bytes(source)


def kernel_bytes(source: str) -> int:
    """Bytes that a launch of a Triton kernel of Inductor moves."""
    estimate = re.search(r"'kernel_num_gb': ([\d.e+-]+)", source)
    assert estimate is not None, "no estimate of the bytes in a kernel of Inductor"
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    [kernel] = [f for name, f in functions.items() if name.startswith("triton_")]
    sizes = [buffer.bytes for buffer in _arguments(functions["get_args"]).values()]
    pointers = [a.arg for a in kernel.args.args if "_ptr" in a.arg]
    loops = [node for node in kernel.body if isinstance(node, ast.For)]
    again = 0
    for pointer, size in zip(pointers, sizes, strict=False):
        load = re.compile(rf"tl\.load\({pointer} ")
        read_in = sum(bool(load.search(ast.unparse(loop))) for loop in loops)
        again += max(0, read_in - 1) * size
    return round(float(estimate[1]) * 1e9) + again


def _arguments(function: ast.FunctionDef) -> dict[str, _Buffer]:
    """The tensors that a `get_args` makes, by name."""
    found = {}
    for node in function.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            call = node.value
            if ast.unparse(call.func) != "rand_strided":
                continue
            dtype = next(ast.unparse(word.value) for word in call.keywords if word.arg == "dtype")
            shape, strides = (ast.literal_eval(argument) for argument in call.args[:2])
            found[ast.unparse(node.targets[0])] = _Buffer(shape, strides, dtype)
    return found


class _Reader:
    """Goes through the statements of `call`, and knows the shape of every buffer."""

    def __init__(self, kernels: dict[str, int], arguments: dict[str, _Buffer]) -> None:
        self.found = Compiled()
        self._kernels, self._buffers = kernels, arguments
        self._waiting: tuple[str, str, list[_Buffer]] | None = None

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self._call(node.value, None)
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            if isinstance(node.value, ast.Call):
                self._call(node.value, name)
            elif isinstance(node.value, (ast.Name, ast.Subscript)):  # an alias, or result[0]
                source = node.value
                origin = source if isinstance(source, ast.Name) else source.value
                known = self._buffers.get(ast.unparse(origin))
                if known is not None:
                    self._buffers[name] = known

    def _buffer(self, node: ast.expr) -> _Buffer | None:
        if isinstance(node, ast.Name):
            return self._buffers.get(node.id)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "reinterpret_tensor":
            origin = self._buffer(node.args[0])
            assert origin is not None, ast.unparse(node)
            shape, strides = (ast.literal_eval(argument) for argument in node.args[1:3])
            return _Buffer(shape, strides, origin.dtype)
        return None

    def _call(self, call: ast.Call, result: str | None) -> None:
        function = ast.unparse(call.func)
        if function.startswith("empty_strided"):
            shape, strides = (ast.literal_eval(argument) for argument in call.args[:2])
            self._made(result, _Buffer(shape, strides, ast.unparse(call.args[2])))
        elif function in ("reinterpret_tensor", "copy_if_misaligned"):
            self._made(result, self._buffer(call if "reinterpret" in function else call.args[0]))
        elif function.endswith(".run"):
            self._add(FUSED, self._kernels[function.removesuffix(".run")])
        elif function.startswith(("extern_kernels.", "torch.ops.")):
            self._library(function, call, result)
        elif function == "assert_size_stride":
            self._asserted(call)

    def _made(self, name: str | None, buffer: _Buffer | None) -> None:
        if name is not None and buffer is not None:
            self._buffers[name] = buffer

    def _library(self, function: str, call: ast.Call, result: str | None) -> None:
        """A kernel of cuDNN or cuBLAS, or attention."""
        name = function.split(".")[-2 if function.endswith(".default") else -1]
        if name not in KINDS:
            raise ValueError(f"{function} has no number of launches; add it to KINDS in {__name__}")
        tensors = [b for b in map(self._buffer, call.args) if b is not None]
        words = {word.arg: word.value for word in call.keywords}
        bias = words.get("bias")
        assert bias is None or ast.unparse(bias) == "None", "a convolution with its bias"
        if name == "convolution":  # its result's shape is asserted in the next line
            assert result is not None
            self._waiting = result, name, tensors
            return
        if KINDS[name] == "attention":
            q, k, v = tensors[:3]
            out = _Buffer((*q.shape[:-1], v.shape[-1]), q.strides, q.dtype)
            self._made(result, out)
            n, heads, length, d = q.shape
            flops = 2 * n * heads * length * k.shape[2] * (d + v.shape[-1])
        else:
            a, b = tensors[-2:]
            found = self._buffer(words["out"])
            assert found is not None, ast.unparse(call)
            out, flops = found, 2 * math.prod(a.shape) * b.shape[-1]
        self._add(KINDS[name], sum(b.bytes for b in (*tensors, out)), flops)

    def _asserted(self, call: ast.Call) -> None:
        if self._waiting is None or ast.unparse(call.args[0]) != self._waiting[0]:
            return
        name, _, tensors = self._waiting
        shape, strides = (ast.literal_eval(argument) for argument in call.args[1:3])
        out = _Buffer(shape, strides, tensors[0].dtype)
        self._made(name, out)
        flops = 2 * math.prod(shape) * math.prod(tensors[1].shape[1:])
        self._add("convolution", sum(b.bytes for b in (*tensors, out)), flops)
        self._waiting = None

    def _add(self, kind: str, moved: int, flops: int = 0) -> None:
        self.found.launches[kind] += 1
        self.found.bytes += moved
        self.found.flops += flops
        self.found.bytes_of[kind] += moved
        self.found.flops_of[kind] += flops


# The record

SECTION = "inductor"


def compiled_networks() -> dict[str, Compiled]:
    """Network -> what Inductor made of it, from docs/counts.json."""
    return {
        name: Compiled(
            launches=Counter(each["launches"]),
            bytes=each["bytes"],
            flops=each["flops"],
            bytes_of=Counter(each["bytes_of"]),
            flops_of=Counter(each["flops_of"]),
            kernels=each["kernels"],
        )
        for name, each in counted.recorded(SECTION).items()
    }


def keep(name: str, found: Compiled) -> None:
    """Write one network's count into docs/counts.json."""
    import triton

    counted.record(
        SECTION,
        name,
        {
            "launches": dict(sorted(found.launches.items())),
            "bytes": found.bytes,
            "flops": found.flops,
            "bytes_of": dict(sorted(found.bytes_of.items())),
            "flops_of": {kind: n for kind, n in sorted(found.flops_of.items()) if n},
            "kernels": found.kernels,
            "torch": torch.__version__.partition("+")[0],
            "triton": triton.__version__,
        },
    )
