"""Compile Triton kernels for a GPU that this machine need not have."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.kernels.triton import Launch

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
INTEGERS = {"int64": "i64", "int32": "i32", "uint8": "u8", "bool": "i1"}


def target(architecture: str) -> Any:
    """Triton's target for an architecture."""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def source_of(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes by position, as triton specializes them."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def specialise(value: Any, path: tuple[int, ...]) -> str:
        if value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        divisible, kind = False, "fp32"
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            kind = "*" + (DTYPES.get(dtype) or INTEGERS[dtype])
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool):
            kind = "i1"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, tuple):
            signature[name] = tuple(specialise(v, (place, i)) for i, v in enumerate(value))
        else:
            signature[name] = specialise(value, (place,))
    return signature, constants, attributes


def compiled_for(launch: Launch, architecture: str) -> Any:
    """Compile a recorded launch for an architecture, without its driver."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes = source_of(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=target(architecture), options=options)


def compile_launch(launch: Launch) -> Any:
    """Compile a kernel as launching it would, for triton's active driver, without running it."""
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    values = [v for name, v in launch.arguments.items() if name not in constants]
    return launch.kernel.warmup(
        *values,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **{name: launch.arguments[name] for name in constants},
    )
